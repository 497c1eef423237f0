"""The loss head on meshes of eight devices against the same functions on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import collectives
from loss_cases import log_softmax
from mesh_cases import placement

from ministral_jax.distributed.placement import Rules
from ministral_jax.errors import UserError
from ministral_jax.losses import chunked
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.targets import Dense, Hidden, LossOptions, Sampled, TopK

B, T, D, DT, V = 8, 16, 16, 24, 64
MESHES = (
    dict(data=8),
    dict(fsdp=8),
    dict(tensor=8),
    dict(context=8),
    dict(fsdp=4, tensor=2),
    dict(data=2, fsdp=2, context=2),
    dict(slice=2, fsdp=2, tensor=2),
)
JSD = LossOptions(objective="jsd", temperature=1.5, ce_weight=0.3, jsd_beta=0.3, chunk=16)
FORWARD = LossOptions(chunk=16)


def case(vocab=V, dtype=np.float64):
    """Student, teacher, labels and a mask with fractional weights and holes that hold NaN."""
    rng = np.random.default_rng(0)
    mask = rng.choice([0.0, 1.0, 0.5], size=(B, T), p=[0.3, 0.5, 0.2]).astype(dtype)
    hidden, theirs = (rng.normal(size=(B, T, d)).astype(dtype) for d in (D, DT))
    hidden[mask == 0] = np.nan
    theirs[mask == 0] = np.nan
    head, their_head = (rng.normal(size=(d, vocab)).astype(dtype) / 4 for d in (D, DT))
    often_right = np.where(rng.random((B, T)) < 0.5, (hidden @ head).argmax(-1), rng.integers(vocab, size=(B, T)))
    labels = np.where(mask == 0, -100, often_right).astype(np.int32)
    return hidden, head, Hidden(theirs, their_head), labels, mask


def everything(functions):
    """Losses, metrics and both gradients of the three functions, in one program."""

    def run(hidden, head, targets, labels, mask):
        gradient = lambda f: jax.value_and_grad(f, (0, 1), has_aux=True)(hidden, head)
        counted = lambda x: jnp.where((mask != 0)[..., None], x, 0)
        there = targets._replace(hidden=counted(targets.hidden))
        return {
            "forward_kl": gradient(lambda h, w: functions.distillation_loss(h, w, targets, labels, mask, FORWARD)),
            "jsd": gradient(lambda h, w: functions.distillation_loss(h, w, targets, labels, mask, JSD)),
            "ce": gradient(lambda h, w: functions.cross_entropy(h, w, labels, mask, 16)),
            "positions": functions.evaluate_positions(counted(hidden), head, there, jnp.abs(labels) % V, 16),
        }

    return jax.jit(run)


@pytest.fixture(scope="module")
def alone():
    with jax.enable_x64(True):
        return jax.device_get(everything(chunked)(*case()))


def close(got, want, tolerance):
    assert got.dtype == want.dtype and got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_losses_metrics_gradients_and_readings_equal_those_of_one_device(sizes, alone):
    """In fp64 the order of at most B T + V additions is all that differs: 192 * 2^-53 = 2e-14 of the sum of their
    magnitudes, which is below 50 times the result here."""
    head = LossHead(placement(**sizes))
    with jax.enable_x64(True), jax.set_mesh(head.placement.mesh):
        got = jax.device_get(everything(head)(*case()))
    jax.tree.map(functools.partial(close, tolerance=1e-12), got, alone)
    for name in ("forward_kl", "jsd", "ce"):
        (_, metrics), (d_hidden, d_head) = got[name]
        assert np.isfinite(d_head).all() and (d_hidden[case()[-1] == 0] == 0).all()
        assert metrics["ce"][1] == case()[-1].sum()


def test_in_fp32_only_the_order_of_additions_differs(alone):
    """B T + V additions of fp32, each off by 2^-24 of a partial sum: 192 * 2^-24 = 1.1e-5; logits of size 10 err by
    D * 2^-24 * 10 = 1e-5 in every reading on both sides."""
    head = LossHead(placement(slice=2, fsdp=2, tensor=2))
    got, want = (jax.device_get(everything(f)(*case(dtype=np.float32))) for f in (head, chunked))
    jax.tree.map(functools.partial(close, tolerance=2.2e-5), got, want)


def test_a_vocabulary_that_is_not_divisible_other_rules_of_a_teacher_and_dense_targets():
    def losses(inputs, rules):
        hidden, head, targets, labels, mask = inputs

        def loss(function):
            total = lambda h, w: function.distillation_loss(h, w, targets, labels, mask, JSD)
            return jax.device_get(jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, head))

        return loss(LossHead(placement(fsdp=4, tensor=2), rules)), loss(chunked)

    hidden, head, theirs, labels, mask = case()
    dense = hidden, head, Dense(theirs.hidden @ theirs.head), labels, mask
    with jax.enable_x64(True):
        for inputs, rules in ((case(vocab=63), None), (case(), Rules(embed=("tensor",), vocab=())), (dense, None)):
            jax.tree.map(functools.partial(close, tolerance=1e-12), *losses(inputs, rules))


def sparse_case(kind, vocab, width):
    """`case` with sparse targets: NaN, and ids that are not distinct or do not exist, where the mask is zero."""
    hidden, head, theirs, labels, mask = case(vocab)
    logprobs = log_softmax(np.where((mask != 0)[..., None], theirs.hidden @ theirs.head, np.nan))
    ids = np.argsort(-logprobs, axis=-1)[..., :width].astype(np.int32)
    ids[mask == 0] = np.random.default_rng(1).choice([0, -1, 3, vocab], size=ids[mask == 0].shape)
    if kind is TopK:
        values = np.take_along_axis(logprobs, ids.clip(0, vocab - 1), axis=-1)
        rest = np.maximum(1 - np.exp(values).sum(-1), 1e-9)
        return hidden, head, TopK(ids, values, np.log(rest)), labels, mask
    counts = np.random.default_rng(2).integers(4, size=ids.shape)
    counts[..., 0] += 1
    return hidden, head, Sampled(ids, counts.astype(np.uint8), -(np.exp(logprobs) * logprobs).sum(-1)), labels, mask


def sparse_results(functions):
    options = LossOptions(ce_weight=0.3, chunk=16)

    def run(hidden, head, targets, labels, mask):
        loss = lambda h, w: functions.distillation_loss(h, w, targets, labels, mask, options)
        there = [
            jax.tree.map(lambda x: jnp.where((mask != 0).reshape(mask.shape + (1,) * (x.ndim - 2)), x, 0), x)
            for x in (hidden, targets, labels)
        ]
        positions = functions.evaluate_positions(there[0], head, *there[1:], 16)
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head), positions

    return jax.jit(run)


@pytest.mark.parametrize("kind", [TopK, Sampled])
def test_sparse_targets_give_on_meshes_what_they_give_on_one_device(kind):
    """Tolerance as above; where 63 columns do not divide, no axis cuts them."""
    reduced = set()
    with jax.enable_x64(True):
        for vocab, width, sizes in (
            (V, V, dict(tensor=8)),
            (V, 6, dict(data=2, fsdp=2, context=2)),
            (V, 6, dict(slice=2, fsdp=2, tensor=2)),
            (63, 6, dict(fsdp=4, tensor=2)),
        ):
            head, inputs = LossHead(placement(**sizes)), sparse_case(kind, vocab, width)
            want = jax.device_get(sparse_results(chunked)(*inputs))
            with jax.set_mesh(head.placement.mesh):
                compiled = sparse_results(head).lower(*inputs).compile()
                got = jax.device_get(compiled(*inputs))
            jax.tree.map(functools.partial(close, tolerance=1e-12), got, want)
            (_, metrics), (d_hidden, d_head) = got[0]
            assert metrics["ce"][1] == inputs[-1].sum() and set(metrics) >= {"kl", "ce"}
            assert np.isfinite(d_head).all() and (d_hidden[inputs[-1] == 0] == 0).all()
            reduced |= {np.prod(s) for c in collectives(compiled.as_text()) if c.in_loop for s in c.shapes}
    assert reduced and max(reduced) <= 16  # numbers of one chunk's tokens, not of its entries


def test_heads_are_gathered_once_and_the_gradient_is_scattered_once_outside_the_loop():
    place = placement(fsdp=4, tensor=2)
    hidden, head, targets, labels, mask = case(dtype=np.float32)
    head_size = D * V // 2  # whole in D, half of V
    loss = lambda h, w: LossHead(place).distillation_loss(h, w, targets, labels, mask, FORWARD)[0]
    sharded = jax.device_put(head, jax.NamedSharding(place.mesh, jax.P("fsdp", "tensor")))
    rows = jax.device_put(hidden, jax.NamedSharding(place.mesh, jax.P("fsdp")))
    found = collectives(jax.jit(jax.grad(loss, (0, 1))).lower(rows, sharded).compile().as_text())
    inside = [c for c in found if c.in_loop]
    # readings of one chunk: FORWARD.chunk tokens of a device's two rows
    assert inside and all(c.op == "all-reduce" and max(map(np.prod, c.shapes)) <= FORWARD.chunk for c in inside)
    outside = [(c.op, c.size) for c in found if not c.in_loop]
    assert sorted(size for op, size in outside if op == "all-gather") == [head_size, DT * V // 2]
    assert [size for op, size in outside if op == "reduce-scatter"] == [head_size // 4]
    reduced = [size for op, size in outside if op == "all-reduce" and size > 1]
    assert reduced == [B // 4 * T * D]  # d_hidden, once over `tensor`


def test_one_device_runs_the_plain_functions_and_shapes_are_checked_before_they_are_cut():
    hidden, head, targets, labels, mask = case(dtype=np.float32)
    one = LossHead(placement(devices=1))
    text = lambda f: str(jax.make_jaxpr(lambda h: f.distillation_loss(h, head, targets, labels, mask, JSD))(hidden))
    assert text(one) == text(chunked)
    with pytest.raises(UserError, match=r"labels of shape \(8, 15\) must be \[B, T\] = \(8, 16\)"):
        LossHead(placement(fsdp=8)).cross_entropy(hidden, head, labels[:, 1:], mask)
