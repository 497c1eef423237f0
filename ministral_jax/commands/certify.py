"""`ministral-jax certify` and `push`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from ministral_jax.arguments import any_place
from ministral_jax.interop.hub import model_place

if TYPE_CHECKING:
    from ministral_jax.certify.certificate import Certificate


def add_certify(commands: Any) -> None:
    """Declare the commands on the subparsers of the command line."""
    certify = commands.add_parser("certify", help="compare an export with the model it was made from, and say so in it")
    text = "exports of one model, in each of which certificate.json is put"
    certify.add_argument("directories", nargs="+", type=any_place, metavar="DIR", help=text)
    text = "the finished stage, another export or model on the hub, that they have to equal"
    certify.add_argument("--against", type=model_place, required=True, metavar="CHECKPOINT", help=text)
    certify.set_defaults(command=_certify)
    push = commands.add_parser("push", help="send an export to a hub, with the login that huggingface_hub has")
    push.add_argument("directory", type=any_place, metavar="DIR")
    push.add_argument("repository", metavar="REPO", help="OWNER/NAME, which is made if it is not there")
    push.add_argument("--private", action="store_true", help="for you alone, where it is made")
    push.add_argument("--dry-run", action="store_true", help="list what would be sent")
    push.set_defaults(command=_push)


def _certify(args: argparse.Namespace) -> int:
    """0: all holds; 1: something does not."""
    from ministral_jax.certify.certificate import FILE, certify, check_pair
    from ministral_jax.certify.in_card import put_in_card
    from ministral_jax.files import write_json
    from ministral_jax.interop.hub import located
    from ministral_jax.places import fetched
    from ministral_jax.stages.card import NAME

    checkpoint, all_hold = located(args.against).resolve(), True  # `.` has no name
    copies = {directory.resolve(): fetched(directory.resolve()) for directory in args.directories}
    for copy in copies.values():  # before the first is compared, which takes minutes
        check_pair(copy, checkpoint)
    for directory, copy in copies.items():
        found = certify(copy, checkpoint)
        write_json(directory / FILE, found.model_dump())
        if (card := directory / NAME).is_file():
            put_in_card(card, found)
        show(directory.name, found)
        all_hold &= found.holds
    return int(not all_hold)


def _push(args: argparse.Namespace) -> None:
    from ministral_jax.certify.push import push

    push(args)


def show(name: str, found: Certificate) -> None:
    """On the terminal; `name`: of the directory."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ministral_jax.certify.in_card import paces_of

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)

    lines = Table.grid(padding=(0, 1, 0, 0))  # what does not fit a line goes on below itself

    def line(holds: bool, said: str) -> None:
        lines.add_row(Text("holds" if holds else "FAILS", "green" if holds else "bold red"), Text(said))

    for check in found.checks:
        line(check.holds, f"{check.name}: {check.said}")
    for r in found.readings:
        said = f"{r.reader}, {r.prompt}: KL {r.kl:.2e}, max |Δlogit| {r.max_difference:.2e}, argmax {r.argmax:.1%}"
        line(r.holds, f"{said}; to our reading {r.to_ours:.1e}")
    for f in found.controls:
        said = f"refused, {f.refused}" if f.refused else f"differs by {f.difference:.1e}"
        line(f.fails, f"control, {f.reader}, {f.control}: {said}")
    console.print(lines)
    if found.serving is not None:
        console.print(paces_of(found.serving))
    for other in found.not_installed:
        console.print(f"not asked: {other} is not installed")
    console.print(f"{name}: {'certified' if found.holds else 'NOT certified'}")
