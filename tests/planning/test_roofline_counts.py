"""What the roofline counts, against compiled programs: FLOPs and bytes of steps compiled here, bytes that the TPU
compiler's programs send, and published step times of dense training."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from ministral_jax.distributed.placement import MeshConfig, Rules, make_mesh
from ministral_jax.models.block import Compute
from ministral_jax.models.spec import PRESETS, ModelSpec, VisionSpec
from ministral_jax.planning.compiler.hlo import Module
from ministral_jax.planning.compiler.traffic import collectives
from ministral_jax.planning.machine import parse_machine
from ministral_jax.planning.timing.assumptions import Assumptions
from ministral_jax.planning.timing.blocks import Cost, Layout
from ministral_jax.planning.timing.costs import costs
from ministral_jax.planning.timing.links import Transfer
from ministral_jax.planning.timing.roofline import StageTime, stage_time
from ministral_jax.planning.work import Held, Phase, Read, StageWork, stage_work
from ministral_jax.stages.base import Graph, Job
from ministral_jax.stages.distill import Distill
from ministral_jax.stages.import_ import Import

VISION = VisionSpec(layers=2, width=64, mlp_width=192, heads=4, head_width=16, patch_size=4, max_image_size=64)
STUDENT = ModelSpec(
    layers=2, width=64, mlp_width=192, heads=4, kv_heads=2, head_width=16, vocab=512, context=4096, vision=VISION
)
TEACHER = STUDENT.model_copy(update={"mlp_width": 384, "width": 96})


def compiled(patches: int, mesh: dict[str, int], **compute) -> tuple[Module, list[Cost], jax.sharding.Mesh]:
    """The step of a small distil stage: its program, and what the roofline counts of it."""
    specs = [spec if patches else spec.model_copy(update={"vision": None}) for spec in (STUDENT, TEACHER)]
    stage = Distill.model_validate(
        {"do": "distill", "from": "student", "teacher": "teacher", "steps": 10, "optimizer": {"lr": 1e-4}}
        | {"data": {"sources": {"text": {"kind": "python-library"}}, "patches": patches}, "loss": {"chunk": 128}}
        | {"batch": {"sequences": 16, "length": 64, "microbatches": 2}, "compute": compute}
    )
    graph = Graph({"teacher": Import(do="import", path="none")}, {"teacher": specs[1]})
    config = MeshConfig(**{"fsdp": 1, **mesh})
    placed = make_mesh(config, jax.devices()[: int(np.prod([*mesh.values()], dtype=int))])
    with jax.set_mesh(placed):
        program = stage.programs(Job("x", stage, specs[0], graph, Path("none"), placed))["step"].lower().compile()
    work = stage_work(stage, specs[0], graph).phases[0].work
    counted = [c for w in work for c in costs(w, Layout(placed, w.model.rules), 1, Assumptions())]
    return Module.read(program.as_text()), counted, placed


def test_flops_are_those_of_the_compiled_step():
    """With a vision tower, microbatches and what the backward pass computes again."""
    module, counted, _ = compiled(64, {}, remat="full", attention="xla")
    assert sum(cost.flops for cost in counted) == pytest.approx(module.flops(), rel=0.01)


def test_bytes_are_those_that_the_compiled_step_sends():
    """But that XLA for CPUs sums gradients of layers where a TPU's scatters them. By axes it also moves some of the
    embedding's gradient over others than ours does."""
    module, counted, mesh = compiled(0, {"data": 2, "fsdp": 2, "context": 2}, attention="xla")
    ours: dict[tuple[str, ...], float] = defaultdict(float)
    theirs: dict[tuple[str, ...], float] = defaultdict(float)
    for cost in counted:
        for transfer in cost.sent:
            summed = transfer.op == "reduce" or (transfer.op == "scatter" and cost.name == "weights")
            ours[transfer.axes] += ring(transfer, mesh) * (2 if summed else 1)
    for found in collectives(module):
        theirs[found.axes(mesh.shape)] += found.sent
    assert sum(ours.values()) == pytest.approx(sum(theirs.values()), rel=0.03)
    for axes in (("fsdp", "context"), ("context",), ("data",)):
        assert ours[axes] == pytest.approx(theirs[axes], rel=0.15), axes


def ring(transfer: Transfer, mesh: jax.sharding.Mesh) -> float:
    n = int(np.prod([mesh.shape[axis] for axis in transfer.axes]))
    return transfer.times * transfer.whole * (n - 1) / n


# ---- the TPU compiler's programs -------------------------------------------------------------------------------------

BF16 = Compute(dtype="bfloat16", remat="attention")


CUT, WHOLE = Rules(), Rules(residual=("context",))
"""The residual stream is cut over `tensor`, or not."""


def distilling(machine: str, shape: tuple[int, int, int, int], rules: Rules = CUT, **mesh: int) -> StageTime:
    """14B from 24B; `shape` has rows, length, microbatches and patches."""
    rows, length, microbatches, patches = shape
    student, teacher = PRESETS["ministral-3-14b"], PRESETS["mistral-small-3.1-24b"]
    read = dict(rows=rows, length=length, compute=BF16, microbatches=microbatches, patches=patches, chunk=4096)
    learner = Held("student", student, "float32", rules, True, ("vision",))
    taught = Held("teacher", teacher, "bfloat16", rules)
    reads = (Read(taught, **read), Read(learner, **read, head="kl", learns=True, taught=taught))
    on = parse_machine(machine)
    return stage_time(StageWork((), (Phase("step", reads),)), on.mesh(MeshConfig(**mesh)), on)


@pytest.mark.parametrize(
    ("machine", "mesh", "compiled_gb"),
    [
        ("v5p:4x4x4", dict(fsdp=64), 260.0),
        ("v5p:4x4x4", dict(data=4, fsdp=16), 125.2),
        ("v5p:8x8x4", dict(data=4, fsdp=64), 129.3),
    ],
)
def test_a_step_sends_what_docs_scaling_says_of_the_tpus_program(machine, mesh, compiled_gb):
    chips = parse_machine(machine).devices
    (phase,) = distilling(machine, (chips, 4096, 1, 0), **mesh).phases
    assert sum(phase.links.values()) / 1e9 == pytest.approx(compiled_gb, rel=0.06)


def test_tensor_parallelism_sends_what_the_tpus_program_does():
    """256 rows of 16,384 tokens and 24,200 patches in four microbatches: 1,144 GB over `tensor` where the stream is
    whole over it, 1,799 GB where it is cut."""
    for rules, compiled_gb in ((WHOLE, 1144), (CUT, 1799)):
        (phase,) = distilling("v5p:4x4x4", (256, 16384, 4, 24200), rules, fsdp=16, tensor=4).phases
        assert phase.links["tensor"] / 1e9 == pytest.approx(compiled_gb, rel=0.02)


# ---- published step times -------------------------------------------------------------------------------------------


def dense(layers: int, width: int, mlp: int, heads: int, vocab: int) -> ModelSpec:
    sizes = dict(layers=layers, width=width, mlp_width=mlp, heads=heads, kv_heads=8, head_width=128, vocab=vocab)
    return ModelSpec(context=131_072, vision=None, **sizes)


PUBLISHED = {
    "Llama 3.1 8B, v6e-256": (dense(32, 4096, 14336, 32, 128_256), "v6e:16x16", {}, 3, 8192, 7207, 0.98),
    "Llama 3.1 70B, v6e-256": (dense(80, 8192, 28672, 64, 128_256), "v6e:16x16", {}, 2, 8192, 960, 1.04),
    "Llama 2 70B, v6e-256": (dense(80, 8192, 28672, 64, 32_000), "v6e:16x16", {}, 4, 4096, 900, 1.23),
    "Mistral 7B, v6e-8": (dense(32, 4096, 14336, 32, 32_768), "v6e:2x4", {}, 3, 8192, 7777, 0.98),
    "Llama 2 70B, v5p, 512 chips": (dense(80, 8192, 28672, 64, 32_000), "v5p:8x8x8", {"data": 8}, 4, 4096, 692, 0.88),
    "Llama 3.1 70B, TPU7x-128": (dense(80, 8192, 28672, 64, 128_256), "tpu7x:4x4x4", {"data": 2}, 4, 8192, 2687, 0.94),
}
"""Model, machine, mesh, rows of a chip, their length, tokens/s of a chip; predicted by measured as in docs/plan.md."""


def tokens_per_second(spec: ModelSpec, name: str, mesh: dict[str, int], rows: int, length: int) -> float:
    """Of a chip, with a forward pass that is computed again."""
    machine = parse_machine(name)
    student = Held("student", spec, "float32", Rules(), True)
    read = Read(student, rows * machine.chips, length, replace(BF16, remat="full"), head="ce", learns=True)
    work = StageWork((student,), (Phase("step", (read,)),))
    time = stage_time(work, machine.mesh(MeshConfig(**mesh)), machine)
    return time.tokens / time.step_seconds / machine.chips


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_training_is_as_far_off_as_the_docs_say(name):
    *given, published, ratio = PUBLISHED[name]
    assert tokens_per_second(*given) / published == pytest.approx(ratio, abs=0.03)
