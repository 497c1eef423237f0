"""`ministral-jax export`."""

from __future__ import annotations

import argparse
from typing import Any

from ministral_jax.arguments import any_place
from ministral_jax.console import say


def add_export(commands: Any) -> None:
    """Declare the command on the subparsers of the command line."""
    command = commands.add_parser("export", help="write a finished stage for other programs")
    command.add_argument("checkpoint", type=any_place, help="directory of a finished stage")
    command.add_argument("destination", type=any_place, metavar="DIR")
    command.add_argument(
        "--format", choices=("hf", "native", "fp8", "gguf"), default="hf", help="the files and their names (hf)"
    )
    dtypes = ("float32", "bfloat16", "float16", "q8_0", "q4_0")
    command.add_argument("--dtype", choices=dtypes, default="bfloat16", help="the last three in gguf (bfloat16)")
    command.add_argument("--license", metavar="ID", help="of the parent, for the model card, e.g. apache-2.0")
    command.add_argument("--base-model", metavar="OWNER/NAME", help="the parent on a hub, for the model card")
    command.add_argument(
        "--language", dest="languages", action="append", default=[], metavar="CODE", help="of the data"
    )
    command.set_defaults(command=_export)


def _export(args: argparse.Namespace) -> None:
    from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
    from ministral_jax.stages.card import FLAGS, read_card
    from ministral_jax.stages.export import export_stage

    card = read_card({key: getattr(args, key) for key in FLAGS})
    placement = Placement(make_mesh(MeshConfig()), Rules())
    export_stage(args.checkpoint, args.destination, args.dtype, placement, args.format, card)
    say(f"{args.destination}: written in {args.dtype}")
