"""What `ministral-jax plan` does: read, plan, show, write."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ministral_jax.errors import UserError
from ministral_jax.explain import suggest
from ministral_jax.files import write_json
from ministral_jax.planning.assumptions import Assumptions
from ministral_jax.planning.machine import Machine, parse_machine
from ministral_jax.planning.plan import make_plan, to_json
from ministral_jax.planning.search import search
from ministral_jax.planning.table import choices_view, plan_view
from ministral_jax.recipe.layers import sort_words
from ministral_jax.recipe.load import load_recipe, order
from ministral_jax.yaml12 import load as read_value


def run_plan(args: argparse.Namespace) -> int:
    """Returns 2 where something makes the recipe impossible on the machine, else 0. Raises `UserError`."""
    machine = _machine(args.on, args.slices)
    settings, stages = sort_words(args.rest)
    assume = parse_assumptions(args.assume)
    recipe = load_recipe(args.recipe, settings)
    names = order(recipe, list(recipe.stages) if args.all else stages)
    here = (args.run_dir or Path("runs") / recipe.name) if args.on == "here" else None
    plan = make_plan(recipe, names, machine, _pairs(args.sizes, "--sizes"), assume=assume, price=args.price, here=here)
    if args.output is not None:
        write_json(args.output, to_json(plan))
    _print(plan_view(plan))
    for stage in plan.stages if args.search else ():
        if stage.time is not None and stage.time.step_seconds:
            _print(choices_view(plan, stage, search(plan.context, stage.name, assume)))
    return 0 if plan.is_possible else 2


def _machine(text: str, slices: int) -> Machine:
    if text != "here":
        return parse_machine(text, slices)
    from ministral_jax.planning.here import here  # measures

    return here()


def parse_assumptions(words: Iterable[str]) -> Assumptions:
    """`Assumptions` with `name=value` in place of defaults. Raises `UserError`: no such name, or no such value."""
    known = {field.name: field.default for field in fields(Assumptions)}
    changes: dict[str, Any] = {}
    for name, text in _pairs(words, "--assume").items():
        if name not in known:
            raise UserError(f"--assume {name}={text}: no assumption {name!r}{suggest(name, known)}")
        value = read_value(text)
        if isinstance(known[name], bool) != isinstance(value, bool) or not isinstance(value, int | float):
            kind = "true or false" if isinstance(known[name], bool) else "a number"
            raise UserError(f"--assume {name}={text}: must be {kind}, e.g. {json.dumps(known[name])}")
        changes[name] = value
    return Assumptions(**changes)


def _pairs(words: Iterable[str], option: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise UserError(f"{option} {word}: must be NAME=VALUE")
        found[name] = value
    return found


def _print(view: Any) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(view)
