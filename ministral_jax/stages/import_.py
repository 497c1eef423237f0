"""Read a Hugging Face directory into the cascade, so that other stages can start from it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ministral_jax.interop.hf import import_hf, read_spec
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import param_shardings
from ministral_jax.stages.base import Graph, Job, Result, Stage


class Import(Stage):
    """Read a Hugging Face directory into the cascade."""

    do: Literal["import"]
    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"

    def resolve(self, graph: Graph, where: str) -> ModelSpec:
        """Read from its `config.json`."""
        return read_spec(Path(self.path))

    def run(self, job: Job[Import]) -> Result:
        _, params = import_hf(Path(self.path), self.dtype, param_shardings(job.spec, job.placement))
        return Result(files=job.save(params))
