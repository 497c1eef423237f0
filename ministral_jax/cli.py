"""`ministral-jax`: its commands, how their words are read, and what the process ends with."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from ministral_jax import __version__
from ministral_jax.commands.certify import add_certify
from ministral_jax.commands.clean import add_clean
from ministral_jax.commands.doctor import add_doctor
from ministral_jax.commands.evaluate import add_evaluate
from ministral_jax.commands.export import add_export
from ministral_jax.commands.generate import add_generate
from ministral_jax.commands.launch import add_launch
from ministral_jax.commands.plan import add_plan
from ministral_jax.commands.report import add_report
from ministral_jax.commands.run import add_run, run
from ministral_jax.commands.status import add_status
from ministral_jax.commands.sweep import add_sweep, sweep
from ministral_jax.console import log, say
from ministral_jax.errors import UserError

_COMMANDS = (
    add_run,
    add_sweep,
    add_launch,
    add_plan,
    add_status,
    add_clean,
    add_report,
    add_export,
    add_generate,
    add_doctor,
    add_certify,
    add_evaluate,
)
"""In the order of the help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 the user's input is at fault (said in one sentence on stderr),
    75 stopped or lost a peer and to be run again, 130 interrupted, 1 a fault (with its traceback)."""
    args = _parse(argv)
    try:
        return _carry_out(args)
    except KeyboardInterrupt:  # while JAX is loaded
        _say("interrupted")
        return 130


def _carry_out(args: argparse.Namespace) -> int:
    if args.command in (run, sweep):  # loading JAX takes a while
        say(f"ministral-jax {__version__}")
    from ministral_jax.distributed.processes import (  # loads JAX, which --help need not
        RETRY,
        Preempted,
        leave,
        lost_peer,
    )

    try:
        code = args.command(args) or 0
    except UserError as error:
        _say(str(error))
        return leave(2, together=True)
    except Preempted as stop:
        _say(f"{stop.said}, before {stop}; {stop.then}")
        return leave(stop.code, together=True)
    except KeyboardInterrupt:  # while nothing is computed that could be saved
        _say("interrupted")
        return leave(130, together=False)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # a file or directory is at fault
            log(traceback.format_exc())
            _say(f"{error.filename}: {error.strerror}")
            return leave(2, together=False)
        say(traceback.format_exc())
        if lost_peer(error):
            _say("another process of this job is gone; the same command goes on from the last saved state")
            return leave(RETRY, together=False)
        return leave(1, together=False)
    return leave(code, together=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand between stages and overrides, which argparse alone would not have."""
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in more) or (more and not hasattr(args, "rest")):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        args.rest = [*args.rest, *more]
    args.words = sys.argv[1:] if argv is None else argv
    return args


def _say(text: str) -> None:
    say(f"ministral-jax: {text}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ministral-jax", description="Turn one vision-language model into a family of small ones."
    )
    parser.add_argument("--version", action="version", version=f"ministral-jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in _COMMANDS:
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
