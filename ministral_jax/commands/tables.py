"""A table on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def print_table(table: Table) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 120  # in a log, rich would cut the columns at 80
    Console(width=width).print(table)
