"""Log-probabilities of labels against fp64 NumPy: values, gradients, what is kept in memory, shards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import collectives
from loss_cases import abstract, check_memory, close, matrix_products, softmax
from mesh_cases import placement

from ministral_jax.errors import UserError
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.logprobs import label_logprobs

B, T, D, V, CHUNK = 8, 16, 16, 64, 16
TEMPERATURE = 0.7


def case(vocab=V):
    """Hidden states, head, labels and a cotangent of the log-probabilities with holes, where nothing means anything."""
    rng = np.random.default_rng(0)
    scale = rng.normal(size=(B, T)) * (rng.random((B, T)) < 0.7)
    hidden = np.where((scale == 0)[..., None], np.nan, rng.normal(size=(B, T, D)))
    labels = np.where(scale == 0, -100, rng.integers(vocab, size=(B, T))).astype(np.int32)
    return hidden, rng.normal(size=(D, vocab)), labels, scale


def oracle(hidden, head, labels, scale, temperature):
    """(logprob, entropy, d_hidden, d_head) in float64, of the counted positions alone."""
    hidden, labels = np.where((scale == 0)[..., None], 0, hidden), np.where(scale == 0, 0, labels)
    q = softmax(hidden @ head / temperature)
    one_hot = np.eye(head.shape[1])[labels]
    d_logits = scale[..., None] * (one_hot - q) / temperature
    logprob = np.log((q * one_hot).sum(-1))
    return logprob, -(q * np.log(q)).sum(-1), d_logits @ head.T, np.einsum("btd,btv->dv", hidden, d_logits)


def results(function, temperature=TEMPERATURE, chunk=CHUNK):
    """(hidden, head, labels, scale) -> (logprob, entropy, d_hidden, d_head), the first two where they count."""

    def weighted(hidden, head, labels, scale):
        found = function(hidden, head, labels, temperature, chunk)
        there = {name: jnp.where(scale != 0, x, 0) for name, x in found.items()}
        return jnp.sum(scale * there["logprob"]) + jnp.sum(there["entropy"]), there

    def run(*arguments):
        (_, there), gradients = jax.value_and_grad(weighted, (0, 1), has_aux=True)(*arguments)
        return there["logprob"], there["entropy"], *gradients

    return jax.jit(run)


@pytest.mark.parametrize(("temperature", "chunk"), [(1.0, 1_000), (TEMPERATURE, 40), (2.5, 8)])  # 1, 4 and 16 chunks
def test_values_and_gradients_equal_the_oracle_and_the_entropy_has_no_gradient(temperature, chunk):
    inputs = case()
    with jax.enable_x64(True):
        got = jax.device_get(results(label_logprobs, temperature, chunk)(*inputs))
    want = oracle(*inputs, temperature)
    counted = inputs[-1] != 0
    for g, w in zip(got, (np.where(counted, want[0], 0), np.where(counted, want[1], 0), *want[2:]), strict=True):
        assert g.dtype == np.float64
        close(g, w)
    assert (got[2][~counted] == 0).all()


def test_the_oracle_gradient_is_the_slope_of_the_oracle_value():
    hidden, head, labels, scale = case()
    direction, step = np.random.default_rng(1).normal(size=head.shape), 1e-5
    value = lambda shift: (scale * oracle(hidden, head + shift * direction, labels, scale, TEMPERATURE)[0]).sum()
    slope = (oracle(hidden, head, labels, scale, TEMPERATURE)[3] * direction).sum()
    np.testing.assert_allclose((value(step) - value(-step)) / (2 * step), slope, rtol=1e-7)


def test_bf16_products_and_fp32_sums():
    """Against fp64 on the same bf16 numbers: d_logits is rounded to bf16 inside the products, and d_hidden once more;
    |error| <= u (|A| |B| + |A B|), u = 2^-8, and the fp32 logits err by D 2^-24 |x| |w|, relatively in q by as much
    over the temperature. The fp32 head's gradient is not rounded again."""
    hidden, head, labels, scale = case()
    rounded = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(jnp.asarray(head, jnp.bfloat16), jnp.float32)
    exact = [np.asarray(x, np.float64) for x in rounded]
    scale = np.float32(scale)
    got = jax.device_get(results(label_logprobs)(*rounded, labels, scale))
    want = oracle(*exact, labels, np.float64(scale), TEMPERATURE)
    assert [x.dtype for x in got] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32]
    x = np.where((scale == 0)[..., None], 0, exact[0])
    noise = 2 * D * 2.0**-24 * (np.abs(x) @ np.abs(exact[1])).max() / TEMPERATURE
    counted = scale != 0
    close(got[0], np.where(counted, want[0], 0), 2 * noise)
    q = softmax(x @ exact[1] / TEMPERATURE)
    d_logits = np.abs(scale[..., None] / TEMPERATURE * (np.eye(V)[np.where(counted, labels, 0)] - q))
    unit = 2.0**-8 + 2 * noise
    slack = noise * np.abs(scale).max() * np.abs(exact[1]).sum(1).max()
    error, size = np.abs(np.float64(got[2]) - want[2]), d_logits @ np.abs(exact[1]).T
    assert (error <= unit * (size + np.abs(want[2])) + slack).all()
    size = np.einsum("btd,btv->dv", np.abs(x), d_logits)
    assert (np.abs(got[3] - want[3]) <= unit * size + noise * size.max()).all()


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_no_array_of_tokens_by_vocabulary_is_made_or_kept():
    loss = lambda h, w, _, y, s, chunk=256: jnp.sum(s * label_logprobs(h, w, y, chunk=chunk)["logprob"])
    for function, count in ((loss, 1), (jax.grad(loss, (0, 1)), 4)):
        assert matrix_products(function, *abstract(8_192, 131_072, 16), largest=256 * 131_072) == count
    check_memory(jax.grad(functools.partial(loss, chunk=32), (0, 1)))


# ---- shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "vocab"),
    [
        (dict(fsdp=4, tensor=2), V),
        (dict(context=8), V),
        (dict(data=4, tensor=2), V),
        (dict(data=2, fsdp=2, context=2), V),
        (dict(slice=2, fsdp=2, tensor=2), 63),  # which no axis cuts
    ],
    ids=str,
)
def test_on_a_mesh_values_and_gradients_are_those_of_the_oracle(sizes, vocab):
    head, inputs = LossHead(placement(**sizes)), case(vocab)
    with jax.enable_x64(True), jax.set_mesh(head.placement.mesh):
        got = jax.device_get(results(head.label_logprobs)(*inputs))
    counted = inputs[-1] != 0
    want = oracle(*inputs, TEMPERATURE)
    jax.tree.map(close, got, (np.where(counted, want[0], 0), np.where(counted, want[1], 0), *want[2:]))
    assert (got[2][~counted] == 0).all()


def test_results_lie_as_the_labels_do_and_the_head_moves_once_outside_the_loops():
    place, rows = placement(data=2, fsdp=2, tensor=2), ("data", "fsdp")
    hidden, head, labels, scale = (np.float32(x) if x.dtype == np.float64 else x for x in case())
    put = lambda x, *axes: jax.device_put(x, jax.NamedSharding(place.mesh, jax.P(*axes)))
    arguments = put(hidden, rows), put(head, "fsdp", "tensor"), put(labels, rows), put(scale, rows)
    step = results(LossHead(place).label_logprobs).lower(*arguments).compile()
    logprob, entropy, *gradients = step(*arguments)
    lies = jax.NamedSharding(place.mesh, jax.P(rows))
    assert logprob.sharding.is_equivalent_to(lies, 2) and entropy.sharding.is_equivalent_to(lies, 2)
    assert gradients[1].sharding.is_equivalent_to(arguments[1].sharding, 2)
    found = collectives(step.as_text())
    inside = [c for c in found if c.in_loop]
    assert inside and all(c.op == "all-reduce" and max(map(np.prod, c.shapes)) <= CHUNK for c in inside)
    outside = [(c.op, c.size) for c in found if not c.in_loop]
    whole = D * V // 2  # the head with all of D
    assert {size for op, size in outside if op == "all-gather"} == {whole}
    assert [size for op, size in outside if op == "reduce-scatter"] == [whole // 2]
    # d_head over `data`, once it is scattered; d_hidden over `tensor`
    assert sorted(size for op, size in outside if op == "all-reduce" and size > 1) == [whole // 2, B // 4 * T * D]


def test_what_does_not_fit_is_refused():
    hidden, head, labels, _ = case()
    with pytest.raises(UserError, match="temperature 0 must be positive"):
        label_logprobs(hidden, head, labels, 0)
    for function in (label_logprobs, LossHead(placement(fsdp=8)).label_logprobs):
        with pytest.raises(UserError, match=r"labels of shape \(8, 15\) must be \[B, T\] = \(8, 16\)"):
            function(hidden, head, labels[:, 1:])
    one = LossHead(placement(devices=1))
    text = lambda f: str(jax.make_jaxpr(functools.partial(f, temperature=2.0))(*(np.float32(hidden), head, labels)))
    assert text(one.label_logprobs) == text(label_logprobs)
