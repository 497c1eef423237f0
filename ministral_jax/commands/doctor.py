"""`ministral-jax doctor`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ministral_jax.interop.hub import model_place


def add_doctor(commands: Any) -> None:
    """Declare the command on the subparsers of the command line."""
    text = "what is wrong with a checkpoint directory, before any device works on it; reads headers alone"
    doctor = commands.add_parser("doctor", help=text)
    doctor.add_argument(
        "source", type=model_place, metavar="SRC", help="a Hugging Face or Mistral directory, or a name on the hub"
    )
    doctor.set_defaults(command=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    """0: nothing is red; 1: something is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ministral_jax.doctor.examine import examine
    from ministral_jax.interop.hub import hub_name, outline

    with outline(args.source) as directory:
        found = examine(directory)
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    colours = {"green": "green", "amber": "yellow", "red": "bold red"}
    lines = Table.grid(padding=(0, 1, 0, 0))  # what does not fit a line goes on below itself
    lines.add_column(min_width=6)
    lines.add_column(min_width=14)
    for finding in found:
        said = finding.said.replace(str(directory), hub_name(args.source) or str(directory))
        lines.add_row(Text(finding.level, colours[finding.level]), finding.subject, Text(said))
    console.print(lines)
    count = {level: sum(finding.level == level for finding in found) for level in colours}
    console.print(f"{count['red']} red, {count['amber']} amber, {count['green']} green")
    return int(count["red"] > 0)
