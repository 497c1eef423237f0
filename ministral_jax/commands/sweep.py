"""`ministral-jax sweep`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ministral_jax.arguments import add_taken_from, local_directory
from ministral_jax.commands.report import finish_sweep
from ministral_jax.errors import UserError


def add_sweep(commands: Any) -> None:
    """Declare the command on the subparsers of the command line."""
    command = commands.add_parser("sweep", help="run a recipe at several settings; stages that they share are run once")
    command.add_argument("recipe", help="YAML file: a recipe, or a sweep, e.g. configs/sweeps/tiny_layer_score.yaml")
    command.add_argument(
        "rest", nargs="*", metavar="STAGE | FILE.yaml | key=v1,v2", help="stages, overlays, values to vary"
    )
    command.add_argument("--zip", action="store_true", help="keys vary together instead of in every combination")
    command.add_argument("--name", help="of the directory below runs/ (default: the file's name and what varies)")
    command.add_argument("--run-dir", type=local_directory, help="where points are written (default: runs/<name>)")
    command.add_argument(
        "--jobs", choices=("local", "slurm", "gke"), default="local", help="here, or print a scheduler's jobs"
    )
    add_taken_from(command)
    command.set_defaults(command=sweep)


def sweep(args: argparse.Namespace) -> int:
    """All points, or a scheduler's jobs that make them. Raises `UserError`."""
    from ministral_jax.distributed.processes import Limits, join
    from ministral_jax.runs.sweep import read_sweep
    from ministral_jax.runs.sweep_run import run_sweep

    join(Limits())  # one process: for its answer to SIGTERM
    found = read_sweep(args.recipe, args.rest, args.zip, args.name)
    run_dir = args.run_dir or Path("runs") / found.name
    if args.jobs == "local":
        return run_sweep(found, run_dir, args.taken_from, lambda: finish_sweep(run_dir))
    if args.taken_from:
        raise UserError("--from needs --jobs local: jobs of a scheduler make what they need")
    from ministral_jax.launching.sweep_jobs import prepare_jobs

    sys.stdout.write(prepare_jobs(found, run_dir, args.jobs))
    return 0
