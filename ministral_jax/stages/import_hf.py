"""Read a Hugging Face directory into the cascade, so that other stages can start from it."""

from __future__ import annotations

from pathlib import Path

from ministral_jax.interop.hf import import_hf
from ministral_jax.models.vlm import param_shardings
from ministral_jax.stages.job import Job, Result


def run(job: Job) -> Result:
    _, params = import_hf(Path(job.stage.path), job.stage.dtype, param_shardings(job.spec, job.placement))
    return Result(files=job.save(params))
