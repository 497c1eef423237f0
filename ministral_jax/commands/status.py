"""`ministral-jax status` and `compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ministral_jax.arguments import run_directory
from ministral_jax.commands.tables import print_table
from ministral_jax.console import say


def add_status(commands: Any) -> None:
    """Declare the commands on the subparsers of the command line."""
    status = commands.add_parser("status", help="how far a run is, or all of runs/")
    status.add_argument("run_dir", type=run_directory, nargs="?", metavar="RUN")
    status.set_defaults(command=_status)
    compare = commands.add_parser("compare", help="settings in which two runs differ, and their figures")
    compare.add_argument("run_dirs", type=run_directory, nargs=2, metavar="RUN")
    compare.set_defaults(command=_compare)


def _status(args: argparse.Namespace) -> None:
    from ministral_jax.runs.reading import read_run
    from ministral_jax.runs.tables import stage_table, status_lines, status_table

    if args.run_dir is None:
        run_dirs = sorted(path.parent for path in Path("runs").glob("*/recipe.json"))
        return print_table(status_table(run_dirs)) if run_dirs else say("there is no run in runs/")
    if (args.run_dir / "sweep.json").is_file():
        return print_table(status_table(sorted(path.parent for path in args.run_dir.glob("*/recipe.json"))))
    run = read_run(args.run_dir)
    print_table(stage_table(run))
    print("\n".join(status_lines(args.run_dir, run)))


def _compare(args: argparse.Namespace) -> None:
    from ministral_jax.runs.tables import comparison_tables

    for table in comparison_tables(args.run_dirs):
        print_table(table)
