"""`ministral-jax generate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ministral_jax.arguments import any_place
from ministral_jax.interop.hub import model_place


def add_generate(commands: Any) -> None:
    """Declare the command on the subparsers of the command line."""
    command = commands.add_parser("generate", help="let a checkpoint go on from a text, a chat or images")
    text = "directory of a finished stage or of a model, or its name on the hub"
    command.add_argument("checkpoint", type=model_place, help=text)
    command.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    images: Any = dict(action="append", default=[], type=any_place)
    command.add_argument("--image", **images, metavar="FILE", help="before every prompt")
    command.add_argument("--chat", action="store_true", help="prompts are a user's messages, not texts to go on with")
    command.add_argument("--think", action="store_true", help="the answer begins with reasoning")
    command.add_argument("--max-tokens", type=int, default=256, metavar="N")
    command.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: always the most probable")
    command.add_argument("--top-p", type=float, default=1.0, metavar="P")
    command.add_argument("--top-k", type=int, default=0, metavar="K")
    command.add_argument("--seed", type=int, default=0, metavar="S")
    command.add_argument("--jsonl", type=any_place, metavar="IN", help='rows of {"prompt", "images"} or {"messages"}')
    command.add_argument("--on-bad-row", choices=("stop", "skip"), default="stop", help="rows that cannot be used")
    command.add_argument("--output", type=Path, metavar="OUT", help="the rows with their completions")
    dtypes = ("float32", "bfloat16")
    command.add_argument("--dtype", choices=dtypes, help="of parameters (default: bfloat16, on a CPU float32)")
    command.add_argument("--cpu-devices", type=int, metavar="N", help="run on N virtual CPU devices")
    command.set_defaults(command=_generate)


def _generate(args: argparse.Namespace) -> None:
    from ministral_jax.distributed.processes import Limits, join, use_cpu

    if args.cpu_devices is not None:
        use_cpu(args.cpu_devices)
    join(Limits())
    from ministral_jax.runs.generate import run_generate

    run_generate(args)
