"""Write a finished stage as a Hugging Face directory, `<stage>/hf`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal

import jax.numpy as jnp
from pydantic import Field

from ministral_jax.data.tokenizer import export_tokenizer
from ministral_jax.distributed.placement import Placement
from ministral_jax.interop.hf import export_hf
from ministral_jax.stages.base import Job, Result, Stage, load_stage, stage_tokenizer


class Export(Stage):
    """Write `from` as a Hugging Face directory, tokenizer included."""

    makes_model: ClassVar = False

    do: Literal["export"]
    source: str = Field(alias="from")
    dtype: Literal["float32", "bfloat16"] = "float32"

    def run(self, job: Job[Export]) -> Result:
        export_stage(job.source, job.directory / "hf", self.dtype, job.placement)
        return Result()


def export_stage(stage_directory: Path, destination: Path, dtype: str, placement: Placement | None = None) -> None:
    """Export a finished stage, with the tokenizer its data was made with. All processes call it, the first writes."""
    spec, params = load_stage(stage_directory, jnp.dtype(dtype), placement)
    tokenizer = stage_tokenizer(stage_directory)
    with TemporaryDirectory() as scratch:
        files = []
        if tokenizer is not None:
            files.append(export_tokenizer(tokenizer, Path(scratch), spec.vision))
        export_hf(params, spec, destination, dtype, files)
