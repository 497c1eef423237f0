"""Write a finished stage as a Hugging Face directory, `<stage>/hf`."""

from __future__ import annotations

from pathlib import Path

from ministral_jax.interop.hf import export_hf
from ministral_jax.manifest import read_manifest
from ministral_jax.stages.job import Job, Result, load_stage


def run(job: Job) -> Result:
    assert job.source is not None
    export_stage(job.source, job.directory / "hf", job.stage.dtype)
    return Result()


def export_stage(stage_directory: Path, destination: Path, dtype: str) -> None:
    """Export a finished stage, with the tokenizer its data was made with."""
    spec, params = load_stage(stage_directory)
    tokenizer = (read_manifest(stage_directory) or {}).get("data", {}).get("tokenizer")
    files = [] if tokenizer is None else [stage_directory.parent / tokenizer]
    export_hf(params, spec, destination, dtype, files)
