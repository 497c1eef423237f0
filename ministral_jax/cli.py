"""`ministral-jax`: argument parsing and nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ministral_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 2 the user's input is at fault (said in one sentence on stderr), 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except UserError as error:
        print(f"ministral-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ministral-jax: interrupted; the same command goes on from the last saved state", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ministral-jax", description="Turn one vision-language model into a family of small ones."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a recipe's stages; finished ones are skipped, interrupted ones resumed")
    run.add_argument("recipe", help="YAML file, e.g. configs/tiny.yaml")
    run.add_argument("rest", nargs="*", metavar="STAGE | key=value", help="stages to run (default: all), and overrides")
    run.add_argument("--run-dir", type=Path, help="where stages are written (default: runs/<recipe's name>)")
    run.set_defaults(command=_run)

    report = commands.add_parser("report", help="write report.html and summary.json of a run")
    report.add_argument("run_dir", type=Path, metavar="RUN")
    report.set_defaults(command=_report)

    export = commands.add_parser("export", help="write a finished stage as a Hugging Face directory")
    export.add_argument("checkpoint", type=Path, help="directory of a finished stage")
    export.add_argument("destination", type=Path, metavar="DIR")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    export.set_defaults(command=_export)
    return parser


def _run(args: argparse.Namespace) -> None:
    from ministral_jax.recipe import load_recipe
    from ministral_jax.run import run_recipe

    overrides = [word for word in args.rest if "=" in word]
    recipe = load_recipe(args.recipe, overrides)
    run_recipe(recipe, args.run_dir or Path("runs") / recipe.name, [word for word in args.rest if "=" not in word])


def _report(args: argparse.Namespace) -> None:
    from ministral_jax.run import report_run

    report_run(args.run_dir)


def _export(args: argparse.Namespace) -> None:
    from ministral_jax.stages.export import export_stage

    export_stage(args.checkpoint, args.destination, args.dtype)


if __name__ == "__main__":
    sys.exit(main())
