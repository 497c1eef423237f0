"""Programs of the shipped recipe compiled for a TPU that is not there, at true widths, against what is predicted."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from model_cases import CASES
from paths import ROOT
from test_memory import in_program

from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.models.spec import PRESETS
from ministral_jax.models.vlm import VLM, Compute, placed_params
from ministral_jax.planning.compiler import compile as compiling
from ministral_jax.planning.compiler.compile import compile_stage, prepare_environment, target_of
from ministral_jax.planning.machine import parse_machine
from ministral_jax.planning.memory.stage import stage_memory
from ministral_jax.planning.timing.roofline import stage_time
from ministral_jax.planning.work import stage_work
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.stages.base import Graph, Job

pytestmark = pytest.mark.aot

LAYERS = 4
STAGE = "14b-short"


@pytest.fixture(scope="module")
def planned():
    """The stage with few layers, its machine, and its parts."""
    prepare_environment()
    parent = PRESETS["mistral-small-3.1-24b"].model_copy(update={"layers": LAYERS})
    made = dict.fromkeys(("parent", "teacher", "instruct-teacher", "reasoning-teacher"), parent)
    overrides = [f"stages.14b-pruned.model.layers={LAYERS}"]
    recipe = load_recipe(ROOT / "configs" / "ministral3.yaml", overrides, lambda name: made)
    graph = Graph(recipe.stages, resolve_specs(recipe, [STAGE], made))
    return recipe.stages[STAGE], graph, parse_machine("v5p:4x4x4")


@pytest.fixture(scope="module")
def with_text(planned, tmp_path_factory):
    """What the compiler says of the step, and its text."""
    stage, graph, machine = planned
    job = Job(STAGE, stage, graph.specs[STAGE], graph, tmp_path_factory.mktemp("none"), machine.mesh(stage.mesh))
    texts, read = [], compiling.Module.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling.Module, "read", lambda text, unknown: texts.append(text) or read(text, unknown))
        (step,) = compile_stage(job, target_of(machine), tmp_path_factory.mktemp("cache"), ["step"])
    return step, texts[0]


@pytest.fixture(scope="module")
def compiled(with_text):
    return with_text[0]


@pytest.mark.parametrize("name", ["v5p:4x4x8", "v6e:8x16", "tpu7x:4x4x4", "v5p:2x2x4"])
def test_processes_have_the_chips_that_are_described(name):
    prepare_environment()
    machine = parse_machine(name)
    ours, theirs = (
        {(tuple(d.coords), d.core_on_chip): d.process_index for d in devices}
        for devices in (machine.described, target_of(machine).devices)
    )
    assert ours == theirs


def test_a_step_takes_the_memory_that_is_predicted(planned, compiled):
    stage, graph, machine = planned
    work = stage_work(stage, graph.specs[STAGE], graph)
    arguments, temporaries = in_program(work, stage_memory(work, machine.mesh(stage.mesh), machine.hosts))
    assert compiled.arguments == pytest.approx(arguments, rel=0.01)
    assert compiled.held - compiled.code == pytest.approx(arguments + temporaries, rel=0.10)
    assert sum(buffer.bytes for buffer in compiled.buffers) <= compiled.held


def test_a_step_computes_and_sends_what_the_mesh_makes_it(planned, compiled):
    """Products of both decoders and heads at least, and no more than as much again: attention, the vision towers and
    what is computed twice. Weights are gathered along fsdp, activations along tensor, which moves most: as many bytes
    as are predicted."""
    stage, graph, machine = planned
    tokens = stage.batch.sequences * stage.batch.length / machine.devices
    student, teacher = graph.specs[STAGE], graph.specs[stage.teacher]
    least = (3 * student.flops_per_token(0) + teacher.flops_per_token(0)) * tokens
    assert least < compiled.flops < 2.5 * least
    assert compiled.traffic[0][:2] == (("tensor",), "all-gather")
    work = stage_work(stage, graph.specs[STAGE], graph)
    (step, *_) = stage_time(work, machine.mesh(stage.mesh), machine).phases
    assert sum(t.sent for t in compiled.traffic if t.axes == ("tensor",)) == pytest.approx(
        step.links["tensor"], rel=0.05
    )
    gathered = sum(t.sent for t in compiled.traffic if t.axes == ("fsdp",) and t.op != "all-reduce")
    assert gathered > compiled.arguments


def kernels(text: str) -> Counter[str]:
    """Attention's kernels in a program, by what they make; those that also give the log-sum-exp are apart."""
    # in a loop over rows an instruction has another name, so its place in the code is looked at
    places = re.findall(r'custom_call_target="tpu_custom_call".*?op_name="([^"]*)"', text, re.DOTALL)
    found = [re.search(r"splash_mqa_(fwd|dq|dkv)_segmented_(no_)?residuals", place) for place in places]
    return Counter(m[1] for m in found if m) + Counter("residuals" for m in found if m and m[1] == "fwd" and not m[2])


def test_attention_of_a_step_is_kernels_and_no_array_has_a_row_twice(planned, with_text):
    """Forward in the student (again for its backward pass, with remat: full), and without it in teacher and towers."""
    stage, (_, text) = planned[0], with_text
    found = kernels(text)
    assert (found["dq"], found["dkv"], found["residuals"]) == (1, 1, 2 if stage.compute.remat == "full" else 1)
    assert found["fwd"] > found["residuals"]
    assert not re.search(rf"\[(\d+,){{2,}}{stage.batch.length},{stage.batch.length}\b", text)


@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("full", 2)])
def test_the_forward_kernel_runs_once_where_its_results_are_kept(remat, forward):
    """A row that four chips share, in zig-zag order: each of a chip's two chunks by kernels of its own."""
    prepare_environment()
    devices = target_of(parse_machine("v5p:2x2x1")).devices
    place = Placement(make_mesh(MeshConfig(fsdp=len(devices) // 4, context=4), devices), Rules())
    spec = CASES["text"].spec
    ids = place.described(dict.fromkeys(("tokens", "segments"), ((len(devices) // 4, 4096), jnp.int32)))
    step = jax.grad(
        lambda p, ids: jnp.sum(VLM(spec, Compute(remat=remat)).apply({"params": p}, **ids, method="hidden"))
    )
    with jax.set_mesh(place.mesh), place.rules.active():
        text = jax.jit(step).lower(placed_params(spec, place), ids).compile().as_text()
    assert kernels(text) == {"fwd": 2 * forward, "residuals": 2 * forward, "dq": 2, "dkv": 2}
