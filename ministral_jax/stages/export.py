"""Write a finished stage for other programs, `<stage>/<format>`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal

import jax.numpy as jnp
from pydantic import Field

from ministral_jax.data.tokenizer import export_tokenizer
from ministral_jax.distributed.placement import Placement
from ministral_jax.interop.export import Export as Model
from ministral_jax.interop.export import export
from ministral_jax.interop.formats import FORMATS, FormatName
from ministral_jax.stages.base import Job, Result, Stage, load_stage, stage_tokenizer


class Export(Stage):
    """Write `from` for other programs, tokenizer included."""

    makes_model: ClassVar = False

    do: Literal["export"]
    source: str = Field(alias="from")
    format: FormatName = "hf"
    """The files and their names: `hf` of transformers, or `native`, Mistral's own. They lie in `<stage>/<format>`."""
    dtype: Literal["float32", "bfloat16"] = "float32"

    def run(self, job: Job[Export]) -> Result:
        export_stage(job.source, job.directory / self.format, self.dtype, job.placement, self.format)
        return Result()


def export_stage(
    stage_directory: Path, destination: Path, dtype: str, placement: Placement | None = None, layout: FormatName = "hf"
) -> None:
    """Export a finished stage in the layout of that name in `FORMATS`, with the tokenizer its data was made with. All
    processes call it, the first writes."""
    spec, params = load_stage(stage_directory, jnp.dtype(dtype), placement)
    tokenizer = stage_tokenizer(stage_directory)
    with TemporaryDirectory() as scratch:
        files = []
        if tokenizer is not None:
            files.append(export_tokenizer(tokenizer, Path(scratch), spec.vision))
        export(Model(params, spec, dtype, files), FORMATS[layout], destination)
