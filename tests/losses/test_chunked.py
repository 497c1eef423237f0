"""The chunked loss head against fp64 NumPy: values, both gradients, masking, precision, memory, shards."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from loss_cases import abstract, check_memory, close, loss_and_gradients, matrix_products, single, softmax

from ministral_jax.errors import UserError
from ministral_jax.losses.chunked import (
    Dense,
    Hidden,
    LossOptions,
    cross_entropy,
    distillation_loss,
    evaluate_positions,
)

B, T, D, DT, V = 3, 7, 6, 5, 11
OBJECTIVES = ("forward_kl", "reverse_kl", "jsd")
EPS32, UNIT_BF16 = 2.0**-24, 2.0**-8  # unit roundoffs


def case(seed=0, shape=(B, T, D, DT, V)):
    """Student, teacher, labels and a mask with fractional weights, holes and one row without any counted token."""
    rng = np.random.default_rng(seed)
    b, t, d, dt, v = shape
    mask = rng.choice([0.0, 1.0, 0.5], size=(b, t), p=[0.3, 0.5, 0.2])
    mask[1 % b] = 0
    return dict(
        hidden=rng.normal(size=(b, t, d)),
        head=rng.normal(size=(d, v)),
        targets=Hidden(rng.normal(size=(b, t, dt)), rng.normal(size=(dt, v))),
        labels=rng.integers(v, size=(b, t)),
        mask=mask,
    )


# ---- the oracle: textbook sums, and the softmax Jacobian applied to the plain derivative in q -----------------------


def divergence_and_slope(objective, p, q, beta):
    """Divergence [...] and its derivative in q [..., V], q taken as free variables."""
    if objective == "forward_kl":
        return (p * np.log(p / q)).sum(-1), -p / q
    if objective == "reverse_kl":
        return (q * np.log(q / p)).sum(-1), np.log(q / p) + 1
    m = beta * p + (1 - beta) * q
    value = (beta * p * np.log(p / m) + (1 - beta) * q * np.log(q / m)).sum(-1)
    through_m = (1 - beta) * (beta * p / m + (1 - beta) * q / m)
    return value, (1 - beta) * (np.log(q / m) + 1) - through_m


def oracle(hidden, head, targets, labels, mask, options):
    """(loss sum, {reading: [B, T]}, d_hidden, d_head, d_logits) in float64."""
    s = hidden @ head
    t = targets.hidden @ targets.head if isinstance(targets, Hidden) else targets.logits
    tau, a = options.temperature, options.ce_weight
    q, one_hot = softmax(s), np.eye(s.shape[-1])[labels]
    p_tau, q_tau = softmax(t / tau), softmax(s / tau)
    value, slope = divergence_and_slope(options.objective, p_tau, q_tau, options.jsd_beta)
    d_value = q_tau * (slope - (q_tau * slope).sum(-1, keepdims=True)) / tau
    readings = dict(
        kl=divergence_and_slope("forward_kl", softmax(t), q, None)[0],
        ce=-np.log((q * one_hot).sum(-1)),
        agreement=s.argmax(-1) == t.argmax(-1),
        prediction=s.argmax(-1),
        confidence=q.max(-1),
        correct=s.argmax(-1) == labels,
    )
    loss = (1 - a) * tau**2 * value + a * readings["ce"]
    d_logits = mask[..., None] * ((1 - a) * tau**2 * d_value + a * (q - one_hot))
    return (mask * loss).sum(), readings, d_logits @ head.T, np.einsum("btd,btv->dv", hidden, d_logits), d_logits


# ---- algebra --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
def test_loss_metrics_and_both_gradients_equal_the_fp64_oracle(objective, temperature, ce_weight):
    options = LossOptions(objective=objective, temperature=temperature, ce_weight=ce_weight, jsd_beta=0.3, chunk=9)
    inputs = case()
    want, readings, d_hidden, d_head, _ = oracle(**inputs, options=options)
    with jax.enable_x64(True):
        (loss, metrics), gradients = loss_and_gradients(**inputs, options=options)
    assert loss.dtype == gradients[0].dtype == gradients[1].dtype == np.float64
    close(loss, want)
    close(gradients[0], d_hidden)
    close(gradients[1], d_head)
    assert set(metrics) == {"kl", "ce", "agreement"}
    for name, (total, count) in metrics.items():
        close(total, (inputs["mask"] * readings[name]).sum())
        assert count == inputs["mask"].sum()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_oracle_gradient_is_the_slope_of_the_oracle_loss(objective):
    inputs, direction, step = case(), np.random.default_rng(1).normal(size=(B, T, D)), 1e-5
    options = LossOptions(objective=objective, temperature=2, ce_weight=0.4, jsd_beta=0.3)
    at = lambda s: oracle(**inputs | {"hidden": inputs["hidden"] + s * direction}, options=options)[0]
    slope = (oracle(**inputs, options=options)[2] * direction).sum()
    np.testing.assert_allclose((at(step) - at(-step)) / (2 * step), slope, rtol=1e-7)  # error O(step²), O(eps/step)


@pytest.mark.parametrize("chunk", [1, 6, 12, 1000])  # 1, 2, 4 and 7 of 7 positions; 2 and 4 do not divide
def test_chunk_size_does_not_change_the_result(chunk):
    options, inputs = LossOptions(ce_weight=0.3, chunk=chunk), case(2)
    want, _, d_hidden, d_head, _ = oracle(**inputs, options=options)
    with jax.enable_x64(True):
        (loss, _), gradients = loss_and_gradients(**inputs, options=options)
        student = map(jnp.asarray, (inputs["hidden"], inputs["head"]))
        positions = evaluate_positions(*student, None, inputs["labels"], chunk)
    close(loss, want)
    close(gradients[0], d_hidden)
    close(gradients[1], d_head)
    assert positions["ce"].shape == (B, T)


def test_dense_targets_equal_hidden_targets_and_targets_get_no_gradient():
    options, inputs = LossOptions(objective="jsd", chunk=9), case()
    dense = Dense(inputs["targets"].hidden @ inputs["targets"].head)
    with jax.enable_x64(True):
        from_hidden = loss_and_gradients(**inputs, options=options)
        from_dense = loss_and_gradients(**inputs | {"targets": dense}, options=options)
        jax.tree.map(close, from_dense, from_hidden)
        loss = lambda targets: distillation_loss(**inputs | {"targets": targets}, options=options)[0]
        of_targets = jax.device_get(jax.grad(loss)(jax.tree.map(jnp.asarray, inputs["targets"])))
    assert all((leaf == 0).all() for leaf in of_targets)


def test_mean_cross_entropy_and_its_gradient_through_a_tied_head():
    inputs = case(3)
    want, readings, d_hidden, d_head, _ = oracle(**inputs, options=LossOptions(ce_weight=1))
    count = inputs["mask"].sum()

    def mean(hidden, embed):
        loss, metrics = cross_entropy(hidden, embed.T, inputs["labels"], inputs["mask"], chunk=9)
        return loss / metrics["ce"][1], metrics

    with jax.enable_x64(True):
        step = jax.jit(jax.value_and_grad(mean, (0, 1), has_aux=True))
        (value, metrics), (got_hidden, got_embed) = jax.device_get(step(inputs["hidden"], inputs["head"].T))
    close(value, want / count)
    close(got_hidden, d_hidden / count)
    close(got_embed, d_head.T / count)
    assert set(metrics) == {"ce", "accuracy"}
    close(metrics["ce"][0], want)
    close(metrics["accuracy"][0], (inputs["mask"] * readings["correct"]).sum())


def test_evaluate_positions_agrees_with_the_oracle_and_with_the_metrics():
    inputs = case(4)
    _, readings, *_ = oracle(**inputs, options=LossOptions())
    arguments = [jax.tree.map(jnp.float32, inputs[name]) for name in ("hidden", "head", "targets")]
    evaluate = jax.jit(functools.partial(evaluate_positions, chunk=9))
    got = evaluate(*arguments, inputs["labels"])
    assert set(got) == {"kl", "ce", "correct", "prediction", "confidence"}
    # logits of size 10 have an fp32 error of about (D + log2 V) * 2^-24 * 10; a reading holds a few of them
    for name, values in got.items():
        assert values.shape == (B, T) and values.dtype == (jnp.int32 if name == "prediction" else jnp.float32)
        close(values, readings[name], tolerance=1e-5)
    assert set(evaluate(*arguments[:2], None, inputs["labels"])) == {"ce", "correct", "prediction", "confidence"}
    _, metrics = distillation_loss(*arguments, inputs["labels"], jnp.float32(inputs["mask"]), LossOptions())
    for name in ("kl", "ce"):
        close(metrics[name][0], (inputs["mask"] * np.asarray(got[name], np.float64)).sum(), tolerance=1e-6)


# ---- masking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_masked_tokens_add_exactly_nothing_whatever_they_hold(objective):
    options, inputs = LossOptions(objective=objective, temperature=2, ce_weight=0.3, chunk=9), case(5)
    loss = lambda *arguments: distillation_loss(*arguments, options)
    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    hidden, head, targets, labels, mask = (jax.tree.map(jnp.asarray, inputs[name]) for name in inputs)
    masked = mask == 0
    spoil = lambda x, value: jnp.where(masked[..., None], value, x)
    want = step(hidden, head, targets, labels, mask)
    for value, label in ((1e30, 0), (jnp.nan, -100), (jnp.inf, V + 5)):
        spoilt = Hidden(spoil(targets.hidden, value), targets.head)
        got = step(spoil(hidden, value), head, spoilt, jnp.where(masked, label, labels), mask)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    assert (want[1][0][masked] == 0).all() and masked[1].all()

    (loss, metrics), gradients = step(spoil(hidden, jnp.nan), head, targets, labels, jnp.zeros_like(mask))
    assert loss == 0 and all(total == 0 and count == 0 for total, count in metrics.values())
    assert all((g == 0).all() for g in gradients)


def test_sums_and_counts_add_up_over_parts_of_a_batch():
    inputs, options = case(6), LossOptions(chunk=9)
    whole, _ = loss_and_gradients(**inputs, options=options)
    parts = []
    for i in range(B):
        rows = {name: inputs[name][i : i + 1] for name in ("hidden", "labels", "mask")}
        targets = inputs["targets"]._replace(hidden=inputs["targets"].hidden[i : i + 1])
        part = jax.tree.map(jnp.asarray, rows | {"head": inputs["head"], "targets": targets})
        parts.append(distillation_loss(**part, options=options))
    jax.tree.map(lambda total, *rows: close(sum(rows), total, 1e-5), whole, *parts)


# ---- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dtype", [jnp.bfloat16, jnp.float32])
def test_bf16_gradients_err_by_one_rounding_per_product_and_sums_stay_fp32(head_dtype):
    """Against fp64 on the same bf16 numbers. Logits, softmax and sums are fp32, so what is left in a gradient is the
    rounding of d_logits to bf16 inside the product and the rounding of the result: |error| <= u (|A| |B| + |A B|),
    u = 2^-8, plus fp32 noise. An fp32 head gets its gradient in fp32.
    """
    inputs, options = case(7, (2, 64, 16, 12, 64)), LossOptions(chunk=32)
    floats = {name: inputs[name] for name in ("hidden", "head", "targets")}
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), floats)
    inputs |= jax.tree.map(lambda x: np.asarray(x, np.float64), rounded)
    exact = inputs["hidden"], inputs["head"]
    want, _, d_hidden, d_head, d_logits = oracle(**inputs, options=options)
    given = inputs | rounded | {"head": rounded["head"].astype(head_dtype)}
    (loss, metrics), (got_hidden, got_head) = loss_and_gradients(**given, options=options)
    assert loss.dtype == jnp.float32 and metrics["kl"][0].dtype == jnp.float32
    assert got_hidden.dtype == jnp.bfloat16 and got_head.dtype == head_dtype

    logit = (np.abs(exact[0]) @ np.abs(exact[1])).max()  # an fp32 product of 16 terms errs by 16 * EPS32 of this
    noise = 16 * EPS32 * logit
    # |dKL| <= |q - p|_1 |ds| + Σ p |log p/q - KL| |dt|, both factors below 2 max|s - t| here
    np.testing.assert_allclose(loss, want, rtol=0, atol=2 * 2 * logit * noise * inputs["mask"].sum())
    size_hidden = np.abs(d_logits) @ np.abs(exact[1]).T
    size_head = np.einsum("btd,btv->dv", np.abs(exact[0]), np.abs(d_logits))
    rounding = UNIT_BF16 if head_dtype == jnp.bfloat16 else 0.0
    error_hidden, error_head = np.abs(np.float64(got_hidden) - d_hidden), np.abs(np.float64(got_head) - d_head)
    slack = 4 * noise  # relative error of q and p from that of the logits
    assert (error_hidden <= UNIT_BF16 * (size_hidden + np.abs(d_hidden)) + slack * size_hidden + noise).all()
    assert (error_head <= UNIT_BF16 * size_head + rounding * np.abs(d_head) + slack * size_head + noise).all()


def test_counts_and_sums_of_bf16_inputs_do_not_saturate():
    tokens = 1_000  # a bf16 counter stands still at 256
    hidden, head, mask = (jnp.full(s, x, jnp.bfloat16) for s, x in (((1, tokens, 2), 0), ((2, 4), 0), ((1, tokens), 1)))
    loss, metrics = cross_entropy(hidden, head, jnp.zeros((1, tokens), jnp.int32), mask, 10)
    assert metrics["ce"][1] == tokens
    np.testing.assert_allclose(loss, tokens * np.log(4), rtol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_extreme_logits_stay_finite(objective):
    options = LossOptions(objective=objective, ce_weight=0.5)
    s = np.float32([[[1e4, -1e4, 0], [1e4, 1e4, -1e4], [0, 1e4, -1e4]]])
    t = np.float32([[[-1e4, 1e4, 0], [1e4, 1e4, -1e4], [-1e4, -1e4, -1e4]]])
    head, labels, mask = np.eye(3, dtype=np.float32), np.int32([[1, 0, 1]]), np.ones((1, 3), np.float32)
    (loss, metrics), gradients = loss_and_gradients(s, head, Dense(t), labels, mask, options)
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in gradients)
    # row by row: 2e4; equal distributions; uniform teacher, (1e4 + 0 + 2e4) / 3 - log 3
    close(metrics["kl"][0], 2e4 + 0 + 1e4 - np.log(3), tolerance=1e-6)
    close(metrics["ce"][0], 2e4 + np.log(2) + 0, tolerance=1e-6)


LOGITS = hnp.arrays(np.float64, (1, 2, 8), elements=st.floats(-50, 50))


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(LOGITS, LOGITS, st.floats(-20, 20))
def test_divergences_are_not_negative_and_zero_between_equals(s, t, shift):
    with jax.enable_x64(True):
        apart, same = jax.device_get((divergences(s, t), divergences(s, s + shift)))
    # the sums hold terms of size |s| + |t| <= 120 (twice for a sum of 8), each off by a few roundoffs of fp64
    noise = 16 * 2**-53 * 240
    for name in OBJECTIVES:
        assert apart[name].min() >= -noise
        assert np.abs(same[name]).max() <= noise
    assert apart["jsd"].max() <= np.log(2) + noise


@jax.jit
def divergences(s, t):
    """{objective: [2]}, one position at a time, so that no sum hides a negative term."""
    label, one = jnp.zeros((1, 1), int), jnp.ones((1, 1))
    at = lambda options: lambda s, t: distillation_loss(s, jnp.eye(8), Dense(t), label, one, options)[0]
    positions = s.swapaxes(0, 1)[:, None], t.swapaxes(0, 1)[:, None]
    return {name: jax.vmap(at(LossOptions(objective=name)))(*positions) for name in OBJECTIVES}


# ---- memory and work ------------------------------------------------------------------------------------------------


def test_no_array_of_tokens_by_vocabulary_and_no_gradient_work_without_a_gradient():
    vocab, options = 131_072, LossOptions(chunk=256)
    loss = lambda *arguments: distillation_loss(*arguments, options)
    evaluate = lambda *arguments: evaluate_positions(*arguments[:4], chunk=256)
    count = lambda function: matrix_products(function, *abstract(8_192, vocab, 16), largest=256 * vocab)
    assert [count(f) for f in (loss, jax.grad(loss, (0, 1), has_aux=True), evaluate)] == [2, 4, 2]


def test_compiled_memory_does_not_grow_with_vocabulary_times_tokens():
    loss = lambda *arguments: distillation_loss(*arguments, LossOptions(chunk=32))
    check_memory(jax.grad(loss, (0, 1), has_aux=True))


# ---- shards ---------------------------------------------------------------------------------------------------------


def test_inside_shard_map_rows_are_split_and_a_replicated_head_gets_the_whole_gradient():
    inputs, options = single(case(8, (8, 6, D, DT, V))), LossOptions(ce_weight=0.3, chunk=4)
    want = loss_and_gradients(**inputs, options=options)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (P("data"), P(), Hidden(P("data"), P()), P("data"), P("data"))

    loss = lambda *arguments: distillation_loss(*arguments, options)

    def inside(*arguments):
        (value, metrics), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(*arguments)
        return jax.lax.psum((value, metrics), "data"), gradients

    summed = lambda *arguments: jax.lax.psum(loss(*arguments), "data")
    across = jax.shard_map(summed, mesh=mesh, in_specs=specs, out_specs=P())
    outside = jax.value_and_grad(across, (0, 1), has_aux=True)
    for function in (jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=(P(), (P("data"), P()))), outside):
        got = jax.jit(function)(*(inputs[name] for name in ("hidden", "head", "targets", "labels", "mask")))
        jax.tree.map(functools.partial(close, tolerance=1e-5), got, want)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict(head=jnp.zeros((D + 1, V))), r"hidden \(3, 7, 6\) and head \(7, 11\) must be \[B, T, D\] and \[D, V\]"),
        (dict(labels=jnp.zeros((B, T + 1), int)), r"labels of shape \(3, 8\) must be \[B, T\] = \(3, 7\)"),
        (dict(mask=jnp.zeros((B,))), r"mask of shape \(3,\) must be"),
        (dict(targets=Hidden(jnp.zeros((B, T, 4)), jnp.zeros((DT, V)))), r"hidden \(3, 7, 4\) and head \(5, 11\)"),
        (dict(targets=Dense(jnp.zeros((B, T - 1, V)))), r"targets cover \[B, T\] = \(3, 6\), the student \(3, 7\)"),
        (dict(targets=Dense(jnp.zeros((B, T, V + 1)))), "teacher's vocabulary of 12 must equal the student's of 11"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changed, said):
    with pytest.raises(UserError, match=said):
        distillation_loss(**jax.tree.map(jnp.asarray, case()) | changed, options=LossOptions())


@pytest.mark.parametrize(
    "wrong", [dict(objective="kl"), dict(temperature=0), dict(ce_weight=1.1), dict(jsd_beta=1), dict(chunk=0)]
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LossOptions(**wrong)
