"""What `ministral-jax plan` does: read, plan, show, write."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ministral_jax.errors import UserError
from ministral_jax.explain import suggest
from ministral_jax.files import write_json, write_text
from ministral_jax.planning.compiler.compile import (
    Target,
    cache_directory,
    compile_stage,
    prepare_environment,
    target_here,
    target_of,
)
from ministral_jax.planning.compiler.table import compiled_view
from ministral_jax.planning.machine import Machine, parse_machine
from ministral_jax.planning.plan import Plan, make_plan, to_json
from ministral_jax.planning.search import search
from ministral_jax.planning.table import choices_view, plan_view
from ministral_jax.planning.timing.assumptions import Assumptions
from ministral_jax.recipe.layers import sort_words
from ministral_jax.recipe.load import load_recipe, order
from ministral_jax.yaml12 import load as read_value


def run_plan(args: argparse.Namespace, page: Callable[[Plan], str]) -> int:
    """What the command line asks for; `page` is what makes HTML of a plan. Returns 2 where something makes the recipe
    impossible on the machine, else 0. Raises `UserError`."""
    if args.output is not None and args.output.suffix not in (".json", ".html"):
        raise UserError(f"--output {args.output}: must end in .json, for all figures, or in .html, for a page")
    if args.compile and args.on != "here":
        prepare_environment()
    machine = _machine(args.on, args.slices)
    settings, stages = sort_words(args.rest)
    assume = parse_assumptions(args.assume)
    recipe = load_recipe(args.recipe, settings)
    names = order(recipe, list(recipe.stages) if args.all else stages)
    here = (args.run_dir or Path("runs") / recipe.name) if args.on == "here" else None
    plan = make_plan(recipe, names, machine, _pairs(args.sizes, "--sizes"), assume=assume, price=args.price, here=here)
    _print(plan_view(plan))
    record = to_json(plan)
    if args.compile:
        record["compiled"] = _compiled(plan, stages, target_here() if args.on == "here" else target_of(machine))
    if args.output is not None and args.output.suffix == ".html":
        write_text(args.output, page(plan))
    elif args.output is not None:
        write_json(args.output, record)
    for stage in plan.stages if args.search else ():
        if stage.time is not None and stage.time.step_seconds:
            _print(choices_view(plan, stage, search(plan.context, stage.name, assume)))
    return 0 if plan.is_possible else 2


def _compiled(plan: Plan, wanted: Sequence[str], target: Target) -> dict[str, Any]:
    """What the compiler says of the stages that were named, or of all, stage by stage as it says it."""
    found: dict[str, Any] = {}
    say = lambda line: print(line, file=sys.stderr, flush=True)
    for stage in plan.stages:
        job = plan.context.jobs.get(stage.name)
        if job is not None and (not wanted or stage.name in wanted):
            programs = compile_stage(job, target, cache_directory(), say=say)
            found[stage.name] = [program.model_dump() for program in programs]
            if programs:
                _print(compiled_view(stage, programs))
    return found


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
