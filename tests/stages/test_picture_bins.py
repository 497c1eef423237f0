"""Pictures over a mesh: wherever they lie, nothing changes; seen once for student and teacher, never for text."""

import re
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from model_cases import IMG, VISION, by_row, random_params, vlm
from picture_cases import mixed
from sampling_cases import placed

from ministral_jax.data.bins import place_whole
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.targets import LossOptions
from ministral_jax.models.vlm import VLM, Compute, param_shardings
from ministral_jax.stages.teaching import distillation, sharing_tower, without_tower
from ministral_jax.teachers.teacher import online, online_targets
from ministral_jax.training.state import init_state, make_step, split_frozen, state_shardings

SPEC, TEACHER = vlm(layers=1), vlm(layers=1, width=24)
COMPUTE = Compute(attention_block=16)
MESHES = {
    "data x fsdp x tensor": dict(data=2, fsdp=2, tensor=2),
    "tensor x context": dict(fsdp=1, tensor=4, context=2),
    "fsdp x context": dict(fsdp=2, context=4),
}


@pytest.fixture(scope="module")
def taught():
    """All of its text counts."""
    batch = mixed()
    counted = (batch["positions"][:, 1:] > 0) & (batch["tokens"][:, 1:] != IMG)
    return batch | {"loss_mask": np.pad(counted, [(0, 0), (0, 1)]).astype(np.float32)}


def step_of(place, microbatches=1, specs=(SPEC, TEACHER)):
    """An update by plain gradient descent, `(state, constants, batch)`."""
    heads, targets = LossHead(place), online_targets(specs[1], COMPUTE, place.rules)
    loss = place.rules.scoped(distillation(VLM(specs[0], COMPUTE), LossOptions(chunk=64), heads, targets))
    student = jax.device_put(random_params(specs[0]), param_shardings(specs[0], place))
    trainable, fixed = split_frozen(student, ("vision",))
    optimizer = optax.sgd(1.0)
    shardings = state_shardings(trainable, optimizer)
    step = make_step(loss, optimizer, optax.constant_schedule(1.0), microbatches, shardings)
    return step, init_state(trainable, optimizer), fixed


def updated(place, batch, microbatches=1, shared=True):
    with jax.set_mesh(place.mesh):
        step, state, fixed = step_of(place, microbatches)
        teacher = random_params(TEACHER, seed=1) | {"vision": random_params(SPEC)["vision"]}
        teacher = jax.device_put(teacher, param_shardings(TEACHER, place))
        state, metrics = step(state, {**fixed, "teacher": without_tower(teacher) if shared else teacher}, batch)
    return jax.device_get((state["params"], metrics["loss"][0]))


@pytest.fixture(scope="module")
def plain(taught):
    """On one device, each row's pictures in a bin, and the teacher with a tower of its own."""
    return updated(placed(dict(fsdp=1)), by_row(taught, VISION), shared=False)


@pytest.mark.parametrize(("mesh", "microbatches"), [*((mesh, 1) for mesh in MESHES), ("data x fsdp x tensor", 2)])
def test_pictures_over_all_devices_change_nothing_but_rounding(taught, plain, mesh, microbatches):
    place = placed(MESHES[mesh], 8)
    there = place_whole(place, taught, VISION, microbatches)
    groups, each, room, width = there["patches"].shape
    one = (groups * each // 8, room, width)  # of a device, of which each has its own
    assert {shard.data.shape[0] * shard.data.shape[1] for shard in there["patches"].addressable_shards} == {one[0]}
    got, loss = updated(place, there, microbatches)
    want, wanted = plain
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        found = got
        for key in path:
            found = found[key.key]
        np.testing.assert_allclose(found, leaf, rtol=0, atol=3e-5 * np.abs(leaf).max(), err_msg=str(path))


def lowered(batch, specs=(SPEC, TEACHER), shared=True):
    """The step on one device, before XLA's compiler has seen it."""
    place = placed(dict(fsdp=1))
    with jax.set_mesh(place.mesh):
        step, state, fixed = step_of(place, specs=specs)
        teacher = random_params(specs[1], seed=1)
        return step.lower(state, {**fixed, "teacher": without_tower(teacher) if shared else teacher}, batch)


def test_student_and_teacher_see_a_picture_once(taught):
    there = place_whole(placed(dict(fsdp=1)), taught, VISION)
    (_, _, room, width) = there["patches"].shape
    embedded = rf"dot_general.*tensor<1x{room}x{width}xf32>, tensor<{width}x{VISION.width}xf32>"
    counts = [len(re.findall(embedded, lowered(there, shared=shared).as_text())) for shared in (True, False)]
    assert counts == [1, 2]


def test_text_costs_what_it_costs_a_model_without_vision(taught):
    text = {key: array for key, array in taught.items() if key not in ("images", "image_slot")}
    blind = SPEC.model_copy(update={"vision": None}), TEACHER.model_copy(update={"vision": None})
    flops = [lowered(text, specs).cost_analysis()["flops"] for specs in (blind, (SPEC, TEACHER))]
    assert flops[0] <= flops[1] < 1.01 * flops[0]  # the projector's gradient is zero, and added to it


def test_a_tower_is_shared_where_it_is_the_same_to_the_last_bit():
    place, params = placed(dict(fsdp=1)), jax.device_put(random_params(SPEC))
    job = SimpleNamespace(
        placement=place,
        spec=SPEC,
        stage=SimpleNamespace(teacher_stage="t"),
        graph=SimpleNamespace(specs={"t": TEACHER}),
    )
    theirs = random_params(TEACHER, seed=1) | {"vision": random_params(SPEC)["vision"]}
    teacher = online(TEACHER, theirs, COMPUTE, place, 32)
    assert "vision" not in sharing_tower(job, teacher, params).constants
    other = jax.tree.map(np.copy, theirs)
    other["vision"]["layers"]["mlp"]["up"][0, 0, 0] *= 1 + 2**-23
    assert "vision" in sharing_tower(job, online(TEACHER, other, COMPUTE, place, 32), params).constants
    job.graph.specs["t"] = TEACHER.model_copy(update={"vision": VISION.model_copy(update={"rope_theta": 5.0})})
    assert "vision" in sharing_tower(job, teacher, params).constants
