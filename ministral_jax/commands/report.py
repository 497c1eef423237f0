"""`ministral-jax report`, and what a run and a sweep end with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ministral_jax.arguments import run_directory
from ministral_jax.commands.tables import print_table
from ministral_jax.console import say

if TYPE_CHECKING:
    from ministral_jax.recipe.types import Recipe


def add_report(commands: Any) -> None:
    """Declare the command on the subparsers of the command line."""
    command = commands.add_parser("report", help="write the report and the figures of a run or of a sweep")
    command.add_argument("run_dir", type=run_directory, metavar="RUN")
    command.set_defaults(command=_report)


def _report(args: argparse.Namespace) -> None:
    if (args.run_dir / "sweep.json").is_file():
        return finish_sweep(args.run_dir)
    from ministral_jax.runs.run import recipe_of

    finish_run(recipe_of(args.run_dir), args.run_dir)


def finish_run(recipe: Recipe, run_dir: Path, names: Sequence[str] = ()) -> None:
    """The summary, the tables and the page of what a run has made."""
    from ministral_jax.report import build_report
    from ministral_jax.runs.reading import read_run
    from ministral_jax.runs.summary import write_summary
    from ministral_jax.runs.tables import family_table, stage_table

    summary = write_summary(recipe, run_dir)
    page = build_report(run_dir)
    run = read_run(run_dir)
    print_table(stage_table(run, names))
    if summary.children:
        print_table(family_table(run))
    for note in run.notes:
        say(note)
    say(f"report: {page}")


def finish_sweep(sweep_dir: Path) -> None:
    """The record, the table and the page of what a sweep has made."""
    from ministral_jax.report.sweep import build_sweep_report
    from ministral_jax.runs.sweep_run import read_record, refresh
    from ministral_jax.runs.sweep_table import sweep_table

    print_table(sweep_table(refresh(read_record(sweep_dir), sweep_dir)))
    print(f"report: {build_sweep_report(sweep_dir)}", file=sys.stderr)
