"""Types of command-line arguments that are places, for every module that declares a command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ministral_jax.errors import UserError
from ministral_jax.places import local_place, place, run_place


def _argument(check: Callable[[str, str], Path]) -> Callable[[str], Path]:
    def checked(text: str) -> Path:
        try:
            return check(text, "directory")
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


any_place, run_directory, local_directory = map(_argument, (place, run_place, local_place))


def add_taken_from(command: argparse.ArgumentParser) -> None:
    """Where stages may be taken from that were made in the same way; see `runs.survey.shelves`."""
    text = "a run or sweep from which stages are taken that were made in the same way; may be given several times"
    options: Any = dict(dest="taken_from", action="append", default=[], type=run_directory, metavar="RUN", help=text)
    command.add_argument("--from", **options)


def add_processes(command: argparse.ArgumentParser) -> None:
    """What every process of a job is told; see `distributed.processes.join`."""
    group = command.add_argument_group("several processes, each with this command")
    group.add_argument("--distributed", action="store_true", help="find the others by the cluster's own means")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, instead of finding it")
    group.add_argument("--process-count", type=int, metavar="N")
    group.add_argument("--process-index", type=int, metavar="I")
    group.add_argument("--cpu-devices", type=int, metavar="K", help="run on K virtual CPU devices in each process")
