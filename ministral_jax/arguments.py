"""Types of command-line arguments that are places, for every module that declares a command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

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
