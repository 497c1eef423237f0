"""What stages hold, against what XLA's compiler for TPUs allots to the programs of the shipped recipe.

`golden/compiled.json` holds its figures per device: `memory_analysis()` of what `compiler.compile.compile_stage` makes
of the stage's programs, with libtpu 0.0.52 and all layers; `make aot` does so anew with a few. A program that does not
fit is refused with the size of its temporaries alone.
"""

import json
import math
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from paths import ROOT, TESTS

from ministral_jax.distributed.placement import AXES, make_mesh
from ministral_jax.models.spec import PRESETS
from ministral_jax.planning.machine import parse_machine
from ministral_jax.planning.memory.draws import draw_moments
from ministral_jax.planning.memory.reads import read_moments
from ministral_jax.planning.memory.shards import ITEMSIZE, Shards
from ministral_jax.planning.memory.stage import stage_memory
from ministral_jax.planning.work import stage_work
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.stages.base import Graph, Job

COMPILED = json.loads((ROOT / "tests" / "golden" / "compiled.json").read_text())


STREAM_WHOLE = "stages.{stage}.sharding.residual=[context]"
"""The programs of the golden file keep the residual stream whole over `tensor`."""


def of(*programs):
    cases = [found for found in COMPILED if found["program"] in programs]
    return pytest.mark.parametrize("found", cases, ids=lambda found: f"{found['stage']} on {found['machine']}")


@cache
def planned(stage, machine, overrides=()):
    """What a stage of the recipe computes and holds, and its mesh: which device lies where makes no difference here."""
    parent = PRESETS["mistral-small-3.1-24b"]
    made = dict.fromkeys(("parent", "teacher", "instruct-teacher", "reasoning-teacher"), parent)
    words = [*overrides]
    recipe = load_recipe(ROOT / "configs" / "ministral3.yaml", words, lambda name: made)
    specs = resolve_specs(recipe, [stage], made)
    settings, on = recipe.stages[stage], parse_machine(machine)
    mesh = Mesh(np.array(on.described, dtype=object).reshape(settings.mesh.shape(on.devices)), AXES)
    work = stage_work(settings, specs[stage], Graph(recipe.stages, specs))
    return work, stage_memory(work, mesh, on.hosts), mesh


def sizes(memory, phase):
    return {item.name: item.bytes for found in memory.phases if found.phase == phase for item in found.items}


def in_program(work, memory, phase="step"):
    """Arguments and temporaries of an update: held models that it does not read and the next batch lie beside it."""
    found = sizes(memory, phase)
    (learner,) = (read for read in work.phase(phase).work if getattr(read, "learns", False))
    roles = {read.model.role for read in work.phase(phase).work if read.model.role != "reference"} | {"teacher"}
    held = sum(size for name, size in found.items() if ": " in name and name.split(":")[0] in roles)
    batch = found["batch"] // (1 + learner.streamed)
    return held + batch, sum(size for name, size in found.items() if ": " not in name and name != "batch")


@of("step")
def test_an_update_needs_what_the_compiler_allots(found):
    work, memory, _ = planned(found["stage"], found["machine"], tuple(found["overrides"]))
    arguments, temporaries = in_program(work, memory)
    allotted = found["bytes"].get("argument", arguments) + found["bytes"]["temp"]
    assert arguments + temporaries == pytest.approx(allotted, rel=0.10)
    # a program is not given what it does not read: the vision tower where no row has an image
    assert arguments == pytest.approx(found["bytes"].get("argument", arguments), rel=0.02)


def allotted(found):
    """To a program that runs: what comes out of it where it is no argument's place."""
    size = found["bytes"]
    return size["argument"] + size["temp"] + size["output"] - size["alias"]


READS = {"evaluate/states": ("evaluate", -1), "calibrate": ("calibrate", 0), "reference": ("step", 0)}
"""The phase in which a program runs, and which of its reads it is."""


@of(*READS)
def test_reading_needs_what_the_compiler_allots(found):
    work, _, mesh = planned(found["stage"], found["machine"], tuple(found["overrides"]))
    phase, place = READS[found["program"]]
    read = work.phase(phase).work[place]
    fullest = max(read_moments((read,), mesh), key=lambda moment: sum(moment.values()))
    beside = fullest["batch"] // 2 if read.streamed else 0
    held = Shards(read.model.spec, read.model.rules, mesh).size() * ITEMSIZE[read.model.dtype]
    assert sum(fullest.values()) - beside + held == pytest.approx(allotted(found), rel=0.10)


@of("cut/mlp")
def test_surgery_needs_what_the_compiler_allots(found):
    memory = planned(found["stage"], found["machine"], tuple(found["overrides"]))[1]
    assert sum(sizes(memory, "surgery").values()) == pytest.approx(allotted(found), rel=0.10)


@of("sample/start", "sample/chunk")
def test_sampling_needs_what_the_compiler_allots(found):
    """Prompts are read, and tokens are drawn while there is room for the first ones."""
    first = (f"stages.{found['stage']}.max_completion_length=256",)
    work, memory, mesh = planned(found["stage"], found["machine"], (*found["overrides"], *first))
    start, *_, chunk = draw_moments(work.phase("sample").work[0], mesh)
    moment = {"sample/start": start, "sample/chunk": chunk}[found["program"]]
    held = sizes(memory, "sample")["policy: weights"]
    assert sum(moment.values()) + held == pytest.approx(allotted(found), rel=0.10)


@pytest.mark.parametrize(
    ("recipe", "stage"),
    [
        ("micro.yaml", "3b-short"),
        ("micro_stored.yaml", "parent"),
        ("micro_stored.yaml", "short"),
        ("micro_post.yaml", "rl"),
    ],
)
def test_arguments_of_an_update_are_those_of_its_program(recipe, stage):
    loaded = load_recipe(TESTS / recipe, ["mesh.fsdp=2", "mesh.tensor=2", "mesh.context=2"])
    specs, settings = resolve_specs(loaded, [stage]), loaded.stages[stage]
    graph, mesh = Graph(loaded.stages, specs), make_mesh(settings.mesh, jax.devices()[:8])
    program = settings.programs(Job(stage, settings, specs[stage], graph, Path("none"), mesh))["step"]
    leaves = [leaf for leaf in jax.tree.leaves(program.arguments) if isinstance(leaf, jax.ShapeDtypeStruct)]
    local = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    work = stage_work(settings, specs[stage], graph)
    assert in_program(work, stage_memory(work, mesh, 1))[0] == pytest.approx(local, rel=0.01)


def test_what_lies_beside_an_update_and_what_is_written():
    """Both batches in flight; the other models that an online stage holds; float32 parameters and states to go on
    from."""
    work, memory, _ = planned("14b-instruct", "v5p:4x4x4")
    step, policy = sizes(memory, "step"), work.held[0].spec
    assert {"policy: moments", "reference: weights", "judge: weights", "gradients", "batch"} <= step.keys()
    assert step["reference: weights"] == pytest.approx(2 * policy.parameters / 64, rel=0.01)
    assert step["policy: moments"] == pytest.approx(8 * policy.decoder_parameters / 64, rel=0.01)
    states = work.keep + 1
    assert memory.written == pytest.approx((1 + 3 * states) * 4 * policy.parameters, rel=0.04)
    assert memory.peak.total == max(phase.total for phase in memory.phases)


@pytest.mark.parametrize("at_once", [2048, 512])
def test_half_a_cache_is_there_twice_while_room_is_made(at_once):
    """That of all answers of a step, or of those that are drawn at once."""
    work, memory, _ = planned("14b-stem", "v5p:4x4x4", (f"stages.14b-stem.answers_at_once={at_once}",))
    draw = work.phase("sample").work[0]
    a_token = 2 * 2 * draw.model.spec.layers * draw.model.spec.kv_heads * draw.model.spec.head_width
    assert draw.waves * at_once == draw.prompts * draw.each
    before = 256 * 256
    longest = at_once * (1.5 * draw.prompt + draw.completion + before / 2) * a_token / 64
    assert sizes(memory, "sample")["cache"] == pytest.approx(longest, rel=0.01)


def test_a_host_holds_the_patches_of_its_rows():
    """The more hosts, the fewer rows on each: nine batches wait and one is read, as bytes."""
    few, many = (planned("14b-short", machine)[1] for machine in ("v5p:4x4x4", "v5p:4x4x8"))
    patches = 10 * 256 * 24_200 * 588
    assert few.host > patches / 16 and many.host > patches / 32 and many.host < few.host
