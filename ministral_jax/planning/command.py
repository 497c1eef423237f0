"""What `ministral-jax plan` does: read, plan, show, write."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ministral_jax.errors import UserError
from ministral_jax.explain import suggest
from ministral_jax.files import write_json, write_text
from ministral_jax.places import refuse_url
from ministral_jax.planning.machine import Machine, parse_machine
from ministral_jax.planning.plan import Plan, make_plan, to_json
from ministral_jax.planning.table import choices_view, plan_view
from ministral_jax.planning.timing.assumptions import Assumptions
from ministral_jax.recipe.layers import sort_words
from ministral_jax.recipe.load import load_recipe, order
from ministral_jax.yaml12 import load as read_value


def run_plan(args: argparse.Namespace, page: Callable[[Plan], str]) -> int:
    """What the command line asks for; `page` is what makes HTML of a plan. Returns 2 where something makes the recipe
    impossible on the machine, else 0. Raises `UserError`."""
    _check(args)
    machine = _machine(args)
    settings, stages = sort_words(args.rest)
    assume = parse_assumptions(args.assume)
    recipe = load_recipe(args.recipe, settings)
    names = order(recipe, list(recipe.stages) if args.all else stages)
    here = (args.run_dir or Path("runs") / recipe.name) if args.on == "here" else None
    plan = make_plan(recipe, names, machine, _pairs(args.sizes, "--sizes"), assume=assume, price=args.price, here=here)
    _print(plan_view(plan))
    record = to_json(plan)
    if args.compile:
        record["compiled"] = _compiled(plan, stages, None if args.on == "here" else machine)
    if args.search:
        record["found"] = _searched(plan)
    if args.output is not None and args.output.suffix == ".html":
        write_text(args.output, page(plan))
    elif args.output is not None:
        write_json(args.output, record)
    return 0 if plan.is_possible else 2


def _check(args: argparse.Namespace) -> None:
    """Options that have no meaning, or none beside the others, before anything is computed."""
    output: Path | None = args.output
    if output is not None:
        refuse_url(output, "--output")
        if output.suffix not in (".json", ".html"):
            raise UserError(f"--output {output}: must end in .json, for all figures, or in .html, for a page")
        if not output.parent.is_dir():
            raise UserError(f"--output {output}: there is no directory {output.parent}; make it first")
    if args.price is not None and not 0 <= args.price < math.inf:
        raise UserError(f"--price {args.price:g} must be a number from 0 on")
    if args.on == "here" and args.slices is not None:
        raise UserError(
            f"--slices {args.slices} goes with a TPU's shape, e.g. --on v5p:4x4x8; --on here counts its own"
        )
    if args.on != "here" and args.run_dir is not None:
        raise UserError(f"--run-dir {args.run_dir} goes with --on here, whose files are looked for; got --on {args.on}")


def _searched(plan: Plan) -> dict[str, Any]:
    """Ways to run each stage that has steps, shown as they are found."""
    from ministral_jax.planning.search import search  # not needed by most plans

    found: dict[str, Any] = {}
    for stage in plan.stages:
        if plan.context.work[stage.name].phase("step") is None:
            continue
        try:
            choices = search(plan.context, stage.name, plan.assume)
        except UserError as nothing:
            found[stage.name] = []
            _print(str(nothing))
            continue
        found[stage.name] = [choice.to_json() for choice in choices]
        _print(choices_view(plan, stage, choices))
    return found


def _compiled(plan: Plan, wanted: Sequence[str], machine: Machine | None) -> dict[str, Any]:
    """What the compiler says of the stages that were named, or of all, stage by stage as it says it; for the devices of
    this process where there is no `machine`."""
    from ministral_jax.planning.compiler.compile import cache_directory, compile_stage, target_here, target_of
    from ministral_jax.planning.compiler.table import compiled_view

    target = target_here() if machine is None else target_of(machine)
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


def _machine(args: argparse.Namespace) -> Machine:
    if args.on != "here":
        if args.compile:
            from ministral_jax.planning.compiler.compile import prepare_environment

            prepare_environment()  # before JAX looks for devices
        return parse_machine(args.on, 1 if args.slices is None else args.slices)
    from ministral_jax.planning.here import here  # measures

    return here()


_AT_MOST_1 = {"matmul", "attention", "memory", "link", "overlap", "activations"}
_ABOVE_0 = {"matmul", "attention", "memory", "link", "disk"}


def _range(name: str, value: float) -> str | None:
    """What a figure must be, where it is something else."""
    most = 1 if name in _AT_MOST_1 else sys.float_info.max
    if 0 < value <= most or (value == 0 and name not in _ABOVE_0):
        return None
    return ("above 0" if name in _ABOVE_0 else "from 0") + (" to 1" if name in _AT_MOST_1 else " on")


def parse_assumptions(words: Iterable[str]) -> Assumptions:
    """`Assumptions` with `name=value` in place of defaults. Raises `UserError`: no such name, or a value that it
    cannot have."""
    known = {field.name: field.default for field in fields(Assumptions)}
    changes: dict[str, Any] = {}
    for name, text in _pairs(words, "--assume").items():
        if name not in known:
            raise UserError(f"--assume {name}={text}: no assumption {name!r}{suggest(name, known)}")
        value = read_value(text)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"--assume {name}={text}: must be a number, e.g. {json.dumps(known[name])}")
        if (wanted := _range(name, value)) is not None:
            raise UserError(f"--assume {name}={text}: must be a number {wanted}, e.g. {json.dumps(known[name])}")
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
