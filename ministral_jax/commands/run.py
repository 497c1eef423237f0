"""`ministral-jax run`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ministral_jax.arguments import add_processes, add_taken_from, run_directory
from ministral_jax.commands.report import finish_run
from ministral_jax.commands.tables import print_table
from ministral_jax.errors import UserError

if TYPE_CHECKING:
    from ministral_jax.models.spec import ModelSpec
    from ministral_jax.recipe.types import Recipe


def add_run(commands: Any) -> None:
    """Declare the command on the subparsers of the command line."""
    command = commands.add_parser(
        "run", help="run a recipe's stages; finished ones are skipped, interrupted ones resumed"
    )
    command.add_argument("recipe", help="YAML file, e.g. configs/tiny.yaml")
    settings = "stages to run (default: all), and what is laid over the recipe: files, then values"
    command.add_argument("rest", nargs="*", metavar="STAGE | FILE.yaml | key=value", help=settings)
    text = "where stages are written (default: runs/<recipe's name>)"
    command.add_argument("--run-dir", type=run_directory, help=text)
    command.add_argument("--dry-run", action="store_true", help="say what would be made, taken and skipped")
    command.add_argument("--all", action="store_true", help="the recipe's optional stages too")
    add_processes(command)
    add_taken_from(command)
    command.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """The stages that are asked for, or what would be made of them. Raises `UserError`."""
    from ministral_jax.distributed.collectives import barrier, is_first
    from ministral_jax.distributed.processes import join, use_cpu
    from ministral_jax.recipe.layers import sort_words
    from ministral_jax.recipe.load import load_fetched, load_recipe, order, resolve_specs
    from ministral_jax.runs.run import opened, run_recipe
    from ministral_jax.runs.survey import made_specs, outlined, shelves

    settings, stages = sort_words(args.rest)
    load = load_recipe if args.dry_run else load_fetched
    recipe = load(args.recipe, settings, lambda name: made_specs(args.run_dir or Path("runs") / name))
    run_dir = args.run_dir or Path("runs") / recipe.name
    made = made_specs(run_dir)
    made = outlined(recipe) | made if args.dry_run else made
    if args.all and stages:
        raise UserError(f"--all runs every stage, {', '.join(stages)} too; give the names or --all")
    stages = list(recipe.stages) if args.all else stages
    resolve_specs(recipe, order(recipe, stages), made)  # before the directory is made
    shelves(args.taken_from)
    if args.dry_run:
        return _dry_run(recipe, run_dir, stages, args.taken_from, made)
    if args.cpu_devices is not None:
        use_cpu(args.cpu_devices)
    join(recipe.limits, args.distributed, args.coordinator, args.process_count, args.process_index)
    with opened(run_dir):
        ran = run_recipe(recipe, run_dir, stages, args.taken_from)
        if is_first():
            finish_run(recipe, run_dir, ran)
        barrier("reported")


def _dry_run(
    recipe: Recipe, run_dir: Path, stages: list[str], taken_from: list[Path], made: Mapping[str, ModelSpec]
) -> None:
    from tempfile import TemporaryDirectory

    from ministral_jax.runs.survey import shelves, survey
    from ministral_jax.runs.tables import plan_table

    with TemporaryDirectory() as scratch:
        plans = survey(recipe, run_dir, stages, shelves(taken_from), Path(scratch), made)
    print_table(plan_table(recipe, plans))
