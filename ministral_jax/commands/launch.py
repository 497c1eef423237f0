"""`ministral-jax launch`."""

from __future__ import annotations

import argparse
from typing import Any

from ministral_jax.arguments import local_directory, run_directory


def add_launch(commands: Any) -> None:
    """Declare the command on the subparsers of the command line."""
    command = commands.add_parser("launch", help="a scheduler's job that runs a recipe: printed, written or submitted")
    command.add_argument("scheduler", choices=("slurm", "gke", "tpu-vm", "local"), help="`local` runs it here, at once")
    command.add_argument("recipe", help="YAML file; its `launch:` block describes the job")
    command.add_argument(
        "rest", nargs="*", metavar="STAGE | FILE.yaml | key=value", help="as of run; launch.slurm.nodes=4 and the like"
    )
    command.add_argument("--run-dir", type=run_directory, help="where stages are written, as the job sees it")
    command.add_argument(
        "--output", type=local_directory, metavar="FILE|DIR", help="write the job instead of printing it"
    )
    command.add_argument("--submit", action="store_true", help="submit it with sbatch, kubectl or gcloud")
    command.set_defaults(command=_launch)


def _launch(args: argparse.Namespace) -> int:
    from ministral_jax.launching.launch import launch

    return launch(args.scheduler, args.recipe, args.rest, args.run_dir, args.output, args.submit)
