"""SLURM: a batch script for `sbatch`."""

from __future__ import annotations

from ministral_jax.launching.templates import fill, shell
from ministral_jax.recipe.launch import SlurmLaunch


def render(job: SlurmLaunch, name: str, command: tuple[str, ...]) -> str:
    """The batch script that runs `command` (the words of a `ministral-jax` command) as `nodes * tasks` processes."""
    several = ["--distributed"] if job.nodes * job.tasks > 1 else []
    return fill("slurm.sbatch", shell, job=job, name=name, command=("ministral-jax", *command, *several))
