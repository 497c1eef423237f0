"""Whole stages' arithmetic on meshes of eight devices against one device: steps, moments, calibration, surgery."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hlo import collectives
from mesh_cases import placement
from model_cases import Case, pack, text, with_images

from ministral_jax.distributed.placement import MeshConfig, Placement, Rules
from ministral_jax.errors import UserError
from ministral_jax.losses.chunked import LossOptions
from ministral_jax.losses.evaluation import as_teacher, hidden, make_evaluate
from ministral_jax.losses.head import LossHead
from ministral_jax.models.spec import ModelSpec, VisionSpec
from ministral_jax.models.vlm import VLM, Compute, head_matrix
from ministral_jax.pruning.statistics import collect
from ministral_jax.pruning.surgery import Surgery
from ministral_jax.stages.base import fresh_params
from ministral_jax.stages.teaching import distillation
from ministral_jax.teachers.teacher import online_targets
from ministral_jax.training.optimizer import OptimizerConfig, make_optimizer
from ministral_jax.training.state import init_state, make_step, split_frozen, state_shardings

pytestmark = pytest.mark.usefixtures("quickly")
VISION = VisionSpec(layers=1, width=16, mlp_width=32, heads=2, head_width=8, patch_size=2, max_image_size=16)
TEACHER = ModelSpec(
    layers=2, width=32, mlp_width=64, heads=4, kv_heads=2, head_width=8, vocab=128, context=64, vision=VISION
)
STUDENT = TEACHER.model_copy(update={"width": 16, "mlp_width": 32})
COMPUTE = Compute(attention_block=8)
ROWS, T, P = 8, 32, 16
MESHES = {
    "data": dict(data=8, fsdp=1),
    "fsdp": dict(fsdp=8),
    "tensor": dict(fsdp=1, tensor=8),
    "context": dict(fsdp=1, context=8),
    "fsdp x tensor": dict(fsdp=4, tensor=2),
    "data x fsdp x context": dict(data=2, fsdp=2, context=2),
    "slice x fsdp x tensor": dict(slice=2, fsdp=2, tensor=2),
}
CONFIG = OptimizerConfig(lr=1e-2, warmup=1)
TOLERANCE = 3e-5
"""Relative to a leaf's largest entry. A float32 sum over N terms in another order moves by about √N · 2^-24 of its
terms' size: N is up to 256 tokens times 128 columns here, and gradients are sums of terms that partly cancel."""


def batch() -> dict[str, np.ndarray]:
    """Rows of three packed documents and padding; the second document of every row begins with an image."""
    rng, document = np.random.default_rng(0), lambda length, seed: text(length, seed, TEACHER)
    rows = [(document(10, s), with_images([(1, 2)], 8, s, TEACHER), document(7, s)) for s in range(ROWS)]
    packed = pack(Case(TEACHER, tuple(rows)), padding=3)
    for name in ("patches", "patch_image", "patch_row", "patch_col"):
        packed[name] = np.pad(
            packed[name], [(0, 0), (0, 0), (0, P - packed[name].shape[2]), (0, 0)][: packed[name].ndim]
        )
    mask = ((packed["segments"] > 0) & (rng.random((ROWS, T)) < 0.8)).astype(np.float32)
    mask[:, [9, 21, 28]] = 0
    labels = {"labels": np.roll(packed["tokens"], -1, 1)}
    documents = {"document": packed["segments"]}
    return packed | labels | documents | dict.fromkeys(("loss_mask", "answer_mask", "text_bytes"), mask)


def step_parts(do: str, place: Placement):
    """(make a step, state, constants, global batch) of a stage on a mesh."""
    heads = LossHead(place, place.rules)
    if do == "distill":
        objective = distillation(
            VLM(STUDENT, COMPUTE), LossOptions(chunk=64), heads, online_targets(TEACHER, COMPUTE, place.rules)
        )
        params, frozen = split_frozen(fresh_params(STUDENT, 0, place), ("vision",))
        constants = {**frozen, "teacher": fresh_params(TEACHER, 1, place)}
    else:
        model, params, constants = VLM(STUDENT, COMPUTE), fresh_params(STUDENT, 0, place), {}

        def objective(params, frozen, batch):
            states = hidden(model, params, batch)
            total, metrics = heads.cross_entropy(states, head_matrix(params), batch["labels"], batch["loss_mask"], 64)
            return total, {**metrics, "loss": metrics["ce"]}

    return place.rules.scoped(objective), params, constants, place.place(batch(), ROWS)


def gradient(do: str, place: Placement):
    with jax.set_mesh(place.mesh):
        objective, params, constants, data = step_parts(do, place)
        (_, metrics), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params, constants, data)
        return jax.device_get((metrics, grads))


@functools.cache
def reference(do: str):
    return gradient(do, placement(devices=1))


def assert_close(ours, theirs, tolerance=TOLERANCE):
    for path, x in jax.tree_util.tree_leaves_with_path(theirs):
        y = np.asarray(jax.tree_util.tree_reduce(lambda t, k: t[k.key], path, ours))
        np.testing.assert_allclose(y, x, rtol=0, atol=tolerance * max(np.abs(x).max(), 1e-6), err_msg=str(path))


# The teacher of a distillation is cut as the student is: meshes of several axes cut it along every one.
@pytest.mark.parametrize(
    ("do", "mesh"), [("train", mesh) for mesh in MESHES] + [("distill", mesh) for mesh in MESHES if " x " in mesh]
)
def test_loss_and_gradients_are_those_of_one_device(do, mesh):
    metrics, grads = reference(do)
    ours, our_grads = gradient(do, placement(**MESHES[mesh]))
    for name, (total, count) in metrics.items():
        assert ours[name][1] == count
        np.testing.assert_allclose(ours[name][0], total, rtol=TOLERANCE, err_msg=name)
    leaves = zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(our_grads), strict=True)
    for (path, x), y in leaves:
        np.testing.assert_allclose(y, x, rtol=0, atol=TOLERANCE * np.abs(x).max(), err_msg=jax.tree_util.keystr(path))


def test_the_compiled_step_moves_the_head_once_and_keeps_moments_cut():
    place = placement(fsdp=4, tensor=2)
    with jax.set_mesh(place.mesh):
        objective, params, constants, data = step_parts("distill", place)
        optimizer = make_optimizer(CONFIG, 10)
        state, shardings = init_state(params, optimizer), state_shardings(params, optimizer)
        step = make_step(objective, optimizer, optax.constant_schedule(1e-2), 1, shardings)
        compiled = step.lower(state, constants, data).compile()
        state, _ = step(state, constants, data)
    head = TEACHER.vocab // 2 * STUDENT.width
    loops = [c for c in collectives(compiled.as_text()) if c.in_loop and c.op != "collective-permute"]
    # In the loop over layers only a layer's kernels and activations move; in the loss's, only numbers per token.
    sized = [c for c in loops if any(set(s) >= {TEACHER.vocab // 2} or set(s) >= {TEACHER.vocab} for s in c.shapes)]
    assert not sized, (head, sized)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["optimizer"]):
        if leaf.ndim >= 2:
            assert not leaf.sharding.is_fully_replicated, jax.tree_util.keystr(path)
            assert leaf.addressable_shards[0].data.size <= leaf.size // 2, jax.tree_util.keystr(path)


@pytest.mark.parametrize("mesh", ["fsdp x tensor", "data x fsdp x context"])
def test_calibration_and_surgery_are_those_of_one_device(mesh):
    target = TEACHER.model_copy(update={"layers": 1, "width": 16, "mlp_width": 32, "tied": True})

    def run(place):
        with jax.set_mesh(place.mesh), place.rules.active():
            params, data = fresh_params(TEACHER, 1, place), place.place(batch(), ROWS)
            statistics = collect(VLM(TEACHER, COMPUTE), params, [data])
            cut = Surgery(target, lambda: [data], placement=place).run(params, TEACHER)
            evaluate = make_evaluate(cut[1], COMPUTE, place, as_teacher(TEACHER, COMPUTE, place))
            found, predictions = evaluate(cut[0], params, [data])
            return statistics, jax.tree.map(lambda x: (x.sharding, np.asarray(x)), cut[0]), cut[2], found, predictions

    one, many = run(placement(devices=1)), run(placement(**MESHES[mesh]))
    for name in ("tokens", "norm_ratio", "cosine", "mlp", "second_moment", "projector"):
        a, b = getattr(one[0], name), getattr(many[0], name)
        np.testing.assert_allclose(b, a, rtol=0, atol=TOLERANCE * np.abs(a).max(), err_msg=name)
    assert [getattr(s, "kept", None) for s in one[2].steps] == [getattr(s, "kept", None) for s in many[2].steps]
    # A basis is found from rounded moments: what is compared is what the cut models do.
    np.testing.assert_allclose(many[3].figures["kl"], one[3].figures["kl"], rtol=1e-3)
    assert np.mean(many[4][0] == one[4][0]) > 0.97
    shardings = jax.tree.leaves(jax.tree.map(lambda leaf: leaf[0], many[1], is_leaf=lambda x: isinstance(x, tuple)))
    assert sum(not s.is_fully_replicated for s in shardings) > len(shardings) * 0.8


def test_a_mesh_that_does_not_fit_is_one_sentence():
    with pytest.raises(UserError, match=r"mesh \{fsdp: -1, tensor: 3\} does not fit 8 devices, but a multiple of 3"):
        placement(fsdp=-1, tensor=3)
    with pytest.raises(UserError, match=r"mesh \{fsdp: 4\} does not fit 8 devices, but 4"):
        placement(fsdp=4)
    with pytest.raises(UserError, match=r"batch.sequences = 12 must be a multiple of 8.*fsdp 8"):
        placement(fsdp=8).check_batch(12, 32, "stages.x")
    with pytest.raises(UserError, match=r"batch.length = 34 must be a multiple of 4, twice mesh.context"):
        placement(fsdp=4, context=2).check_batch(4, 34, "stages.x")
    with pytest.raises(ValueError, match="one of them may be -1"):
        MeshConfig(data=-1)
    with pytest.raises(ValueError, match="mesh axis 'row'"):
        Rules(embed=("row",))


def test_microbatches_on_a_mesh_change_nothing_but_rounding():
    place = placement(fsdp=4, tensor=2)
    results = []
    for microbatches in (1, 2):
        with jax.set_mesh(place.mesh):
            objective, params, constants, data = step_parts("train", place)
            optimizer = optax.sgd(1.0)
            shardings = state_shardings(params, optimizer)
            step = make_step(objective, optimizer, optax.constant_schedule(1.0), microbatches, shardings)
            results.append(jax.device_get(step(init_state(params, optimizer), constants, data)[0]["params"]))
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=TOLERANCE * max(np.abs(a).max(), 1e-3))


def test_every_host_reads_the_rows_of_its_devices():
    place = placement(fsdp=4, context=2)
    assert place.rows(8).tolist() == list(range(8))  # one process holds them all
    data = place.place(batch(), ROWS)
    assert data["tokens"].sharding.shard_shape((ROWS, T)) == (2, 16)
    assert data["patches"].sharding.shard_shape(data["patches"].shape)[:2] == (2, 1)
    assert jnp.array_equal(jnp.sort(data["tokens"]), jnp.sort(batch()["tokens"]))
