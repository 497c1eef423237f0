"""What stages hold, against what XLA's compiler for TPUs allots to the programs of the shipped recipe.

`golden/compiled.json` holds its figures per device. Of a program, `Program.lower().compile().memory_analysis()` on a
topology of libtpu gives them, with the recipe and the overrides that stand there.
"""

import json
from functools import cache

import pytest

from ministral_jax.models.spec import PRESETS
from ministral_jax.planning.machine import parse_machine
from ministral_jax.planning.memory import stage_memory
from ministral_jax.planning.reading import PLACED
from ministral_jax.planning.work import stage_work
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.stages.base import Graph
from paths import ROOT

COMPILED = json.loads((ROOT / "tests" / "golden" / "compiled.json").read_text())
STEPS = [found for found in COMPILED if found["program"] == "step"]


@cache
def planned(stage, machine, overrides=()):
    parent = PRESETS["mistral-small-3.1-24b"]
    made = dict.fromkeys(("parent", "teacher", "instruct-teacher", "reasoning-teacher"), parent)
    recipe = load_recipe(ROOT / "configs" / "ministral3.yaml", overrides, lambda name: made)
    specs = resolve_specs(recipe, [stage], made)
    settings, on = recipe.stages[stage], parse_machine(machine)
    work = stage_work(settings, specs[stage], Graph(recipe.stages, specs))
    return stage_memory(work, on.mesh(settings.mesh), on.hosts)


@pytest.mark.parametrize("found", STEPS, ids=lambda found: f"{found['stage']} on {found['machine']}")
def test_a_step_needs_what_the_compiler_allots(found):
    memory = planned(found["stage"], found["machine"], tuple(found["overrides"]))
    step = next(phase for phase in memory.phases if phase.phase == "step")
    bytes_of = {item.name: item.bytes for item in step.items}
    in_program = step.total - bytes_of["batch"] * (PLACED - 1) // PLACED  # the next batch is no argument yet
    assert in_program == pytest.approx(found["bytes"]["argument"] + found["bytes"]["temp"], rel=0.10)
    arguments = sum(size for name, size in bytes_of.items() if ": " in name) + bytes_of["batch"] // PLACED
    assert arguments == pytest.approx(found["bytes"]["argument"], rel=0.01)
