"""`ministral-jax evaluate`."""

from __future__ import annotations

import argparse
from typing import Any

from ministral_jax.arguments import add_processes, any_place
from ministral_jax.commands.tables import print_table
from ministral_jax.interop.hub import model_place


def add_evaluate(commands: Any) -> None:
    """Declare the command on the subparsers of the command line."""
    evaluate = commands.add_parser("evaluate", help="a checkpoint's scores at tasks")
    evaluate.add_argument(
        "checkpoint", type=model_place, help="directory of a finished stage or of a model, or its name on the hub"
    )
    names = "digits, needle, .. which are made here; tasks of lm-evaluation-harness; `paper`, the paper's benchmarks"
    evaluate.add_argument("--tasks", nargs="+", required=True, metavar="TASK[@SHOTS]", help=names)
    evaluate.add_argument(
        "--output", type=any_place, metavar="DIR", help="keep results there; what is there is not redone"
    )
    evaluate.add_argument(
        "--limit", type=int, metavar="N", help="questions of each task (default: 200, of the harness all)"
    )
    evaluate.add_argument(
        "--batch", type=int, default=16, metavar="N", help="requests at once; scores do not depend on it"
    )
    evaluate.add_argument("--chat", action="store_true", help="questions of the harness in the chat template")
    evaluate.add_argument("--think", action="store_true", help="answers in the chat template begin with reasoning")
    evaluate.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="of an answer, where a task is made here"
    )
    evaluate.add_argument("--include", metavar="DIR", help="further tasks for the harness")
    evaluate.add_argument("--unsafe-code", action="store_true", help="let the harness run code that the model wrote")
    evaluate.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of parameters (default: bfloat16, on a CPU float32)"
    )
    add_processes(evaluate)
    evaluate.set_defaults(command=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from ministral_jax.distributed.collectives import barrier, is_first
    from ministral_jax.distributed.processes import Limits, join, use_cpu

    if args.cpu_devices is not None:
        use_cpu(args.cpu_devices)
    join(Limits(), args.distributed, args.coordinator, args.process_count, args.process_index)
    from ministral_jax.runs.evaluate import run_evaluate

    table = run_evaluate(args)
    if is_first():
        print_table(table)
    barrier("evaluated")
