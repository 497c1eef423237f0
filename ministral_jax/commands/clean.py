"""`ministral-jax clean`."""

from __future__ import annotations

import argparse
from typing import Any

from ministral_jax.arguments import run_directory


def add_clean(commands: Any) -> None:
    """Declare the command on the subparsers of the command line."""
    command = commands.add_parser("clean", help="what a run or a sweep keeps that no finished result needs")
    command.add_argument("run_dir", type=run_directory, metavar="RUN")
    command.add_argument("--delete", action="store_true", help="remove it instead of listing it")
    command.set_defaults(command=_clean)


def _clean(args: argparse.Namespace) -> None:
    from ministral_jax.runs.clean import leftovers, remove, size
    from ministral_jax.runs.lock import owned

    leftovers(args.run_dir)  # before anything is written in what is no run
    with owned(args.run_dir):
        for what, paths in leftovers(args.run_dir).items():
            print(f"{sum(map(size, paths)) / 1e6:12,.1f} MB  {what}: {', '.join(str(p) for p in paths)}")
            for path in paths if args.delete else ():
                remove(path)
    if not args.delete:
        print("nothing was removed; add --delete")
