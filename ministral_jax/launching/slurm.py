"""SLURM: a batch script for `sbatch`."""

from __future__ import annotations

from ministral_jax.launching.job import SlurmJob
from ministral_jax.launching.templates import fill, shell


def render(job: SlurmJob, name: str, command: tuple[str, ...]) -> str:
    """The batch script that runs `command` (the words of a `ministral-jax` command) as `nodes * tasks` processes."""
    several = job.nodes * job.tasks > 1
    words = ("ministral-jax", *command, *(("--distributed",) if several else ()))
    return fill("slurm.sbatch", shell, job=job, name=name, command=words)
