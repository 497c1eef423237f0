"""Preference optimisation, online and offline, against fp64 NumPy and the identities it must keep."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ministral_jax.errors import UserError
from ministral_jax.losses.preference import MOST, PreferenceOptions, decide, preference_loss

N = 12
NAMES = ("chosen", "rejected", "margins", "accuracies")
OPTIONS = [
    PreferenceOptions(beta=beta, loss_type=loss_type, rescale_beta=rescale)
    for beta in (0.1, 2.0)
    for loss_type in ("odpo", "sigmoid", "ipo", "offset")
    for rescale in (True, False)
]
LOGISTIC = [options for options in OPTIONS if options.loss_type in ("odpo", "sigmoid")]


def case(seed=0):
    """Summed log-probabilities [4, N] of policy and reference on A and B, probabilities (1/2, 0 and 1 among them) and
    weights with holes, where nothing means anything."""
    rng = np.random.default_rng(seed)
    values = -rng.exponential(30, size=(4, N))
    values[:2] = values[2:] + 5 * rng.normal(size=(2, N))
    p, weights = rng.random(N), rng.choice([1.0, 0.5], size=N)
    p[:4], weights[-3:] = (0.5, 0.0, 1.0, 0.25), 0
    values[:, -3:], p[-3:] = np.nan, np.nan
    return *values, p, weights


def loss_of(policy_a, policy_b, reference_a, reference_b, probability, weights, options):
    return preference_loss((policy_a, policy_b), (reference_a, reference_b), probability, weights, options)


@functools.partial(jax.jit, static_argnums=6)
def value_and_gradients(*arguments):
    return jax.value_and_grad(loss_of, (0, 1), has_aux=True)(*arguments)


def of(*arguments):
    with jax.enable_x64(True):
        return jax.device_get(value_and_gradients(*arguments))


def by_hand(policy_a, policy_b, reference_a, reference_b, p, weights, options):
    """(loss, gradient in policy_a, metrics), one pair at a time, with logistic functions spelled out."""
    loss, floor, gradient, decided = 0.0, 0.0, np.zeros(N), [np.zeros(5)]
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    scale = 1 / options.beta if options.rescale_beta else 1.0
    for i in np.flatnonzero(weights):
        log_ratio_a, log_ratio_b = policy_a[i] - reference_a[i], policy_b[i] - reference_b[i]
        margin, side = options.beta * (log_ratio_a - log_ratio_b), np.sign(p[i] - 0.5)
        q = p[i] if options.loss_type == "odpo" else {1: 1.0, 0: 0.5, -1: 0.0}[side]
        weight = weights[i] * (1 if options.loss_type == "ipo" else scale)
        if options.loss_type == "ipo":  # Azar et al., eq. 17: (h - 1 / 2 tau)^2, h the difference of the log-ratios
            h, half = log_ratio_a - log_ratio_b, 1 / (2 * options.beta)
            loss += weight * (q * (h - half) ** 2 + (1 - q) * (h + half) ** 2)
            gradient[i] = weight * 2 * (h - (2 * q - 1) * half)
        else:
            shifted = margin
            if options.loss_type == "offset":  # Amini et al., eq. 3: -log sigmoid(margin - difference of rewards)
                with np.errstate(divide="ignore"):
                    shifted = margin - min(max(np.log(p[i]) - np.log1p(-p[i]), -np.log(999)), np.log(999))
            loss -= weight * (q * np.log(sigmoid(shifted)) + (1 - q) * np.log(sigmoid(-shifted)))
            gradient[i] = weight * options.beta * (sigmoid(shifted) - q)
        floor -= weight * sum(x * np.log(x) for x in (q, 1 - q) if x > 0)
        if side:
            ratios = options.beta * np.array([log_ratio_a, log_ratio_b])
            chosen, rejected = ratios if side > 0 else ratios[::-1]
            decided.append(weights[i] * np.array([1, chosen, rejected, side * margin, side * margin > 0]))
    count, *sums = np.sum(decided, axis=0)
    metrics = {f"rewards/{name}": (x, count) for name, x in zip(NAMES, sums, strict=True)}
    total = weights.sum()
    return loss, gradient, metrics | {"loss": (loss, total), "entropy_floor": (floor, total)}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_gradients_and_metrics_equal_the_formula(options):
    inputs = case()
    (loss, metrics), gradients = of(*inputs, options)
    with np.errstate(divide="ignore"):
        want, gradient, of_hand = by_hand(*inputs, options)
    assert loss.dtype == gradients[0].dtype == np.float64
    np.testing.assert_allclose(loss, want, rtol=1e-12)
    np.testing.assert_allclose(gradients[0], gradient, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(gradients[0], -gradients[1])
    assert set(metrics) == set(of_hand)
    for name, expected in of_hand.items():
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-12, atol=1e-14, err_msg=name)
    assert 0 < metrics["rewards/accuracies"][0] < metrics["rewards/accuracies"][1]


@pytest.mark.parametrize("rescale", [True, False])
def test_a_certain_judge_gives_the_sigmoid_loss_of_dpo(rescale):
    *values, _, _ = case(1)
    values, beta = [x[:-3] for x in values], 0.1
    ones = np.ones(N - 3)
    loss = lambda **kind: of(*values, ones, ones, PreferenceOptions(beta=beta, rescale_beta=rescale, **kind))
    delta = (values[0] - values[2]) - (values[1] - values[3])
    closed = np.logaddexp(0, -beta * delta).sum() / (beta if rescale else 1)  # -log sigmoid(x) = log(1 + exp(-x))
    np.testing.assert_allclose(loss()[0][0], closed, rtol=1e-13)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-15), loss(loss_type="sigmoid"), loss())
    assert loss()[0][1]["entropy_floor"][0] == 0


@hypothesis.settings(deadline=None)
@hypothesis.given(
    hnp.arrays(np.float64, (4, 1), elements=st.floats(-300, 0)), st.floats(0, 1), st.sampled_from(LOGISTIC[::3])
)
def test_swapping_the_responses_and_the_probability_changes_nothing(values, p, options):
    """But for roundings: of 1 - p, and of p x + (1 - p) y, where one product is fused with the sum; x and y are at most
    1 + |βΔ| here, and their slopes at most 1."""
    a, b, ra, rb = values
    (loss, metrics), (d_a, d_b) = of(a, b, ra, rb, np.array([p]), np.ones(1), options)
    (swapped, of_swapped), (s_b, s_a) = of(b, a, rb, ra, np.array([1 - p]), np.ones(1), options)
    hypothesis.assume(options.loss_type == "odpo" or np.sign(p - 0.5) == np.sign(0.5 - (1 - p)))
    scale = 1 / options.beta if options.rescale_beta else 1
    slack = 2**-51 * scale * (1 + options.beta * np.abs(values).sum())
    assert abs(loss - swapped) <= slack and loss >= metrics["entropy_floor"][0] - slack
    np.testing.assert_allclose((d_a, d_b), (s_a, s_b), rtol=0, atol=2**-51 * scale * options.beta)
    for name in NAMES:
        name = f"rewards/{name}"
        np.testing.assert_array_equal(metrics[name], of_swapped[name])


def test_an_undecided_judge_is_symmetric_and_drives_the_margin_to_zero():
    *values, _, _ = case(2)
    half, one = np.full(N, 0.5), np.append(np.ones(N - 3), [0, 0, 0])
    for options in LOGISTIC:
        (loss, metrics), (d_a, d_b) = of(*values, half, one, options)
        (swapped, _), (s_a, s_b) = of(values[1], values[0], values[3], values[2], half, one, options)
        np.testing.assert_allclose(loss, swapped, rtol=1e-15)
        np.testing.assert_allclose((d_a, d_b), (s_b, s_a), rtol=0, atol=1e-15 * max(1, np.abs(d_a).max()))
        delta = np.nan_to_num((values[0] - values[2]) - (values[1] - values[3]))
        assert (np.sign(d_a) == np.sign(delta)).all()
        assert all(metrics[f"rewards/{name}"] == (0, 0) for name in NAMES)
        (least, metrics), (d_a, _) = of(*values[2:], *values[2:], half, one, options)
        assert (d_a == 0).all() and least == pytest.approx(metrics["entropy_floor"][0], rel=1e-14)


def test_where_policy_and_reference_agree_the_rescaled_gradient_does_not_depend_on_beta():
    *_, reference_a, reference_b, p, weights = case(3)
    start = reference_a, reference_b, reference_a, reference_b, p, weights
    want = np.where(weights > 0, weights * (0.5 - p), 0)
    for beta in (0.1, 7.0):
        (_, metrics), (d_a, _) = of(*start, PreferenceOptions(beta=beta))
        np.testing.assert_allclose(d_a, want, rtol=1e-14, atol=0)
        _, (plain, _) = of(*start, PreferenceOptions(beta=beta, rescale_beta=False))
        np.testing.assert_allclose(plain, beta * want, rtol=1e-14, atol=0)
        assert metrics["rewards/accuracies"][0] == metrics["rewards/accuracies"][1] / 2  # no margin yet


def test_where_policy_and_reference_agree_offline_losses_are_those_of_the_papers():
    """log 2 of DPO; of IPO the square of what is wanted; of an offset the loss of a margin of less than nothing."""
    *_, reference_a, reference_b, _, weights = case(5)
    start, p = (reference_a, reference_b, reference_a, reference_b), np.full(N, 0.8)
    beta, want = 0.25, {}
    for loss_type in ("sigmoid", "ipo", "offset"):
        options = PreferenceOptions(beta=beta, loss_type=loss_type, rescale_beta=False)
        (_, metrics), _ = of(*start, p, weights, options)
        want[loss_type] = metrics["loss"][0] / metrics["loss"][1]
    np.testing.assert_allclose(want["sigmoid"], np.log(2), rtol=1e-14)
    np.testing.assert_allclose(want["ipo"], (1 / (2 * beta)) ** 2, rtol=1e-14)
    np.testing.assert_allclose(want["offset"], np.log(1 + 0.8 / 0.2), rtol=1e-14)


def test_an_offset_is_a_margin_that_is_asked_for_and_never_infinite():
    """The loss of a pair whose margin is its offset is log 2, whatever the probability."""
    for p, offset in ((0.5, 0.0), (0.9, np.log(9)), (1.0, MOST), (0.0, -MOST), (1e-3, -np.log(999))):
        for beta in (0.1, 2.0):
            options = PreferenceOptions(beta=beta, loss_type="offset", rescale_beta=False)
            one, zero = np.ones(1), np.zeros(1)
            (loss, _), (d_a, _) = of(offset / beta * one, zero, zero, zero, p * one, one, options)
            np.testing.assert_allclose(loss, np.log(2), rtol=1e-12)
            np.testing.assert_allclose(d_a, beta * np.sign(0.5 - p) / 2, rtol=1e-12)


@pytest.mark.parametrize("loss_type", ["odpo", "sigmoid", "offset"])
def test_extreme_margins_and_masked_pairs_are_finite_in_fp32(loss_type):
    delta = np.float32([1e4, -1e4, 1e30, -1e30, 0, np.nan])
    zero, weights = np.zeros(6, np.float32), np.float32([1, 1, 1, 1, 1, 0])
    for p in (0.0, 0.3, 0.5, 1.0):
        arguments = delta, zero, zero, zero, np.full(6, p, np.float32), weights
        options = PreferenceOptions(loss_type=loss_type)
        (loss, metrics), (d_a, d_b) = jax.device_get(value_and_gradients(*arguments, options))
        assert loss.dtype == np.float32 and d_a.dtype == np.float32
        assert np.isfinite(loss) and np.isfinite(d_a).all() and np.isfinite(d_b).all() and d_a[-1] == d_b[-1] == 0
        assert all(np.isfinite(x) for x in jax.tree.leaves(metrics))
    (loss, metrics), gradients = value_and_gradients(*(delta,) * 5, 0 * weights, PreferenceOptions(loss_type=loss_type))
    assert loss == 0 and not any(np.any(x) for x in jax.tree.leaves((metrics, gradients)))


def test_parts_of_a_batch_add_up_and_nothing_but_the_policy_has_a_gradient():
    inputs, options = case(4), PreferenceOptions()
    with jax.enable_x64(True):
        whole = loss_of(*map(jnp.asarray, inputs), options)
        parts = [loss_of(*(jnp.asarray(x[i : i + 4]) for x in inputs), options) for i in range(0, N, 4)]
        others = jax.grad(lambda *x: loss_of(*x, options)[0], (2, 3, 4))(*map(jnp.asarray, inputs))
    add = lambda w, *x: np.testing.assert_allclose(sum(x), w, rtol=1e-13)
    jax.tree.map(add, *jax.device_get((whole, *parts)))
    assert all((x == 0).all() for x in jax.device_get(others))


# ---- on the host ----------------------------------------------------------------------------------------------------


def test_a_looping_response_loses_whatever_the_judge_says():
    nan = np.nan
    judged = np.array([0.9, 0.9, 0.1, 0.9, nan, nan, nan, 1.0])
    a_loops = np.array([False, True, False, True, False, True, True, False])
    b_loops = np.array([False, False, True, True, False, False, True, True])
    p, kept = decide(judged, a_loops, b_loops)
    assert p.dtype == np.float64 and kept.dtype == bool
    assert p.tolist() == [0.9, 0.0, 1.0, 0.5, 0.5, 0.0, 0.5, 1.0]
    assert kept.tolist() == [True, True, True, False, False, True, False, True]
    swapped, same = decide(1 - judged, b_loops, a_loops)
    np.testing.assert_allclose(swapped, 1 - p, atol=2**-53)
    assert (same == kept).all()
    for wrong in (-0.1, 1.5):
        with pytest.raises(UserError, match=f"preference {wrong} must be a probability"):
            decide(np.array([0.5, wrong]), a_loops[:2], b_loops[:2])


@pytest.mark.parametrize("wrong", [dict(beta=0), dict(beta=float("inf")), dict(loss_type="dpo"), dict(gamma=1)])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PreferenceOptions(**wrong)
