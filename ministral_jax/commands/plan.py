"""`ministral-jax plan`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ministral_jax.arguments import local_directory

if TYPE_CHECKING:
    from ministral_jax.planning.plan import Plan


def add_plan(commands: Any) -> None:
    """Declare the command on the subparsers of the command line."""
    text = "whether a recipe fits a machine, how long it takes there and what must change; nothing is run"
    command = commands.add_parser("plan", help=text)
    command.add_argument("recipe", help="YAML file")
    command.add_argument("rest", nargs="*", metavar="STAGE | FILE.yaml | key=value", help="as of run")
    command.add_argument("--on", required=True, metavar="CHIP:SHAPE", help="v5p:4x4x8, v6e:16x16, h100:32, .. or here")
    command.add_argument("--slices", type=int, metavar="N", help="TPU slices joined by a network")
    command.add_argument("--price", type=float, metavar="P", help="of a chip for an hour, in any currency")
    command.add_argument("--all", action="store_true", help="the recipe's optional stages too")
    pairs: Any = dict(action="append", default=[])
    command.add_argument("--sizes", **pairs, metavar="STAGE=PRESET", help="sizes of an import that is not here")
    command.add_argument(
        "--assume", **pairs, metavar="NAME=VALUE", help="another figure of the model, see docs/plan.md"
    )
    command.add_argument("--search", action="store_true", help="find meshes, microbatches and remat that are faster")
    command.add_argument("--compile", action="store_true", help="ask XLA's compiler, of the stages named; minutes each")
    command.add_argument("--run-dir", type=local_directory, help="with --on here, where the run would be written")
    text = "all figures, or a page with pictures"
    command.add_argument("--output", type=Path, metavar="FILE.json|FILE.html", help=text)
    command.set_defaults(command=_plan)


def _plan(args: argparse.Namespace) -> int:
    from ministral_jax.planning.command import run_plan

    def page(plan: Plan) -> str:
        from ministral_jax.report.plan import plan_page  # loads Matplotlib

        return plan_page(plan, shlex.join(["ministral-jax", *args.words]))

    return run_plan(args, page)
