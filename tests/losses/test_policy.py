"""Group-relative policy optimisation against fp64 NumPy: advantages, weights of tokens, loss and gradient."""

import functools
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ministral_jax.errors import UserError
from ministral_jax.losses.logprobs import label_logprobs
from ministral_jax.losses.policy import PolicyOptions, advantages, policy_loss, token_weights
from ministral_jax.training.state import init_state, make_step

NAN = np.nan
P, G, T, LIMIT = 5, 4, 6, 8
LOSS_TYPES = ("magistral", "dapo", "grpo", "dr_grpo")
REWARDS = np.array(
    [
        [1.0, 0.0, 0.0, 1.0],
        [0.5, 0.5, 0.5, 0.5],  # no variance
        [1.0, NAN, 0.2, 0.2],
        [NAN, NAN, 1.0, NAN],  # one alone
        [0.1, 0.1, 0.1 + 1e-9, NAN],  # hardly any variance
    ]
)
KEPT = [True, False, True, False, True]


def completions(seed=0):
    """mask [P, G, T]: lengths from 0 to T; what has no reward, or is too long (here: one), counts nothing."""
    lengths = np.random.default_rng(seed).integers(1, T + 1, size=(P, G))
    lengths[0, 2] = 0
    return (np.arange(T) < np.where(np.isnan(REWARDS), 0, lengths)[..., None]).astype(np.uint8)


# ---- advantages -----------------------------------------------------------------------------------------------------


def advantages_by_hand(rewards, scale):
    """One group at a time, in plain Python."""
    groups, found, kept = [[r for r in row if not math.isnan(r)] for row in rewards], {}, []
    for p, group in enumerate(groups):
        kept.append(len(set(group)) > 1)
        for g, r in enumerate(rewards[p]):
            if kept[p] and not math.isnan(r):
                found[p, g] = r - sum(group) / len(group)
                if scale == "group":
                    mean = sum(group) / len(group)
                    found[p, g] /= math.sqrt(sum((x - mean) ** 2 for x in group) / len(group)) + 1e-6
    if scale == "batch" and found:
        mean = sum(found.values()) / len(found)
        std = math.sqrt(sum((x - mean) ** 2 for x in found.values()) / len(found))
        found = {key: (x - mean) / (std + 1e-6) for key, x in found.items()}
    return [[found.get((p, g), 0.0) for g in range(len(row))] for p, row in enumerate(rewards)], kept


def check_advantages(rewards, scale):
    got, kept = advantages(rewards, scale)
    want, want_kept = advantages_by_hand(rewards.tolist(), scale)
    assert got.dtype == np.float64 and kept.dtype == bool and kept.tolist() == want_kept
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    assert (got[~kept] == 0).all() and (got[np.isnan(rewards)] == 0).all()
    return got, kept


@pytest.mark.parametrize("scale", ["batch", "group", "none"])
def test_advantages_are_rewards_less_the_group_mean_scaled(scale):
    got, kept = check_advantages(REWARDS, scale)
    assert kept.tolist() == KEPT
    assert scale == "none" or got[0] == pytest.approx(got[0, 0] * np.array([1, -1, -1, 1]))


@hypothesis.settings(deadline=None)
@hypothesis.given(
    hnp.arrays(np.float64, (3, 4), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0, NAN])),
    st.sampled_from(["batch", "group", "none"]),
)
def test_properties_of_advantages(rewards, scale):
    got, kept = check_advantages(rewards, scale)
    np.testing.assert_allclose(got.sum(axis=1), 0, atol=1e-12)
    shifted, _ = advantages(rewards + np.array([[4.0], [-2.0], [0.0]]), scale)
    np.testing.assert_allclose(shifted, got, rtol=0, atol=1e-12)
    if scale == "batch" and kept.any():
        used = got[kept[:, None] & ~np.isnan(rewards)]
        assert used.std() == pytest.approx(1, abs=1e-4)  # 1e-6 over a deviation of 0.05 or more


def test_without_any_variance_nothing_is_kept_and_nothing_is_nan():
    for rewards in (np.full((2, 3), 0.7), np.full((2, 3), NAN), np.zeros((2, 1))):
        got, kept = advantages(rewards, "batch")
        assert not kept.any() and (got == 0).all()
    with pytest.raises(UserError, match=r"must be \[P, G\] and finite"):
        advantages(np.array([[1.0, np.inf]]), "none")


# ---- weights --------------------------------------------------------------------------------------------------------


def weights_by_hand(mask, kept, loss_type, limit):
    tokens = {(p, g): int(mask[p, g].sum()) for p in range(P) for g in range(G) if kept[p] and mask[p, g].any()}
    groups = {p: sum(n for (q, _), n in tokens.items() if q == p) for p, _ in tokens}
    found = np.zeros(mask.shape)
    for p, g in tokens:
        each = {
            "magistral": lambda p, g: 1 / len(groups) / groups[p],
            "dapo": lambda p, g: 1 / sum(groups.values()),
            "grpo": lambda p, g: 1 / len(tokens) / tokens[p, g],
            "dr_grpo": lambda p, g: 1 / len(tokens) / limit,
        }[loss_type]
        found[p, g] = np.where(mask[p, g], each(p, g), 0)
    return found


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("kept", [KEPT, [False, True, True, True, True], [False] * P], ids=str)
def test_weights_of_tokens(loss_type, kept):
    mask, kept = completions(), np.array(kept)
    got = token_weights(mask, kept, loss_type, LIMIT)
    want = weights_by_hand(mask, kept, loss_type, LIMIT)
    assert got.dtype == np.float64 and got.shape == (P, G, T)
    np.testing.assert_allclose(got, want, rtol=1e-15)
    assert ((got > 0) == ((mask == 1) & kept[:, None, None])).all()
    lengths = mask.sum(-1)[kept]
    whole = lengths[lengths > 0].mean() / LIMIT if loss_type == "dr_grpo" and kept.any() else float(kept.any())
    assert got.sum() == pytest.approx(whole, rel=1e-14)


def test_a_group_whose_completions_are_all_masked_takes_no_share():
    mask = completions()
    mask[0] = 0
    for loss_type in LOSS_TYPES[:3]:
        assert token_weights(mask, np.array(KEPT), loss_type, LIMIT).sum() == pytest.approx(1, rel=1e-14)
    with pytest.raises(UserError, match=r"mask \(5, 4\) and kept \(5,\)"):
        token_weights(mask[..., 0], np.array(KEPT), "dapo", LIMIT)


# ---- loss -----------------------------------------------------------------------------------------------------------


def loss_by_hand(new, old, advantage, weights, options):
    """(loss, gradient, metrics) of one token at a time, from the formula."""
    loss, gradient, readings = 0.0, np.zeros(new.shape), []
    for i in zip(*np.nonzero(weights), strict=True):
        r, a, w = math.exp(new[i] - old[i]), advantage[i], weights[i]
        clipped = min(max(r, 1 - options.epsilon), 1 + options.epsilon_high)
        loss -= w * min(r * a, clipped * a)
        cut = clipped * a < r * a
        gradient[i] = 0 if cut else -w * a * r
        readings.append((r, cut and r < 1, cut and r > 1, r - 1 - math.log(r)))
    sums = np.sum(readings, axis=0) if readings else np.zeros(4)
    metrics = {n: (s, len(readings)) for n, s in zip(("ratio", "clipped_low", "clipped_high", "kl_old"), sums)}  # noqa: B905
    return loss, gradient, metrics | {"loss": (loss, weights.sum())}


def batch(loss_type="magistral", spread=0.3):
    """Rows [P * G, T]: log-probabilities (NaN where nothing counts), advantages and weights."""
    rng = np.random.default_rng(1)
    advantage, kept = advantages(REWARDS, "batch")
    weights = token_weights(completions(), kept, loss_type, LIMIT).reshape(P * G, T)
    old = -rng.exponential(size=weights.shape)
    new = old + spread * rng.normal(size=weights.shape)
    hide = lambda x: np.where(weights == 0, NAN, x)
    return hide(new), hide(old), hide(np.broadcast_to(advantage.reshape(-1, 1), weights.shape)), weights


@functools.partial(jax.jit, static_argnums=4)
def value_and_gradient(new, old, advantage, weights, options):
    return jax.value_and_grad(policy_loss, has_aux=True)(new, old, advantage, weights, options)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_gradient_and_metrics_equal_the_formula(loss_type):
    inputs, options = batch(loss_type), PolicyOptions(loss_type=loss_type)
    with jax.enable_x64(True):
        (loss, metrics), gradient = jax.device_get(value_and_gradient(*inputs, options))
    want, want_gradient, want_metrics = loss_by_hand(*inputs, options)
    assert loss.dtype == gradient.dtype == np.float64
    np.testing.assert_allclose(loss, want, rtol=0, atol=1e-14)
    np.testing.assert_allclose(gradient, want_gradient, rtol=0, atol=1e-14)
    assert set(metrics) == set(want_metrics)
    for name, (total, count) in metrics.items():
        np.testing.assert_allclose((total, count), want_metrics[name], rtol=1e-12, atol=1e-12, err_msg=name)
    assert min(metrics["clipped_low"][0], metrics["clipped_high"][0]) > 0


def test_in_fp32_gradients_of_dropped_groups_are_exactly_zero_and_nan_does_not_leak():
    *inputs, weights = (np.float32(x) for x in batch())
    (loss, metrics), gradient = jax.device_get(value_and_gradient(*inputs, weights, PolicyOptions()))
    dropped = np.repeat(~np.array(KEPT), G)
    assert loss.dtype == np.float32 and np.isfinite(loss) and np.isfinite(gradient).all()
    assert (gradient[dropped] == 0).all() and (gradient[weights == 0] == 0).all() and gradient.any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))
    (loss, metrics), gradient = value_and_gradient(*inputs, np.zeros_like(weights), PolicyOptions())
    assert loss == 0 and (gradient == 0).all() and all(x == 0 for x in jax.tree.leaves(metrics))


def test_with_the_old_policy_ratios_are_one_and_the_gradient_is_weight_times_advantage():
    _, old, advantage, weights = batch()
    with jax.enable_x64(True):
        (loss, metrics), gradient = jax.device_get(value_and_gradient(old, old, advantage, weights, PolicyOptions()))
    there = np.where(weights > 0, advantage, 0)
    np.testing.assert_array_equal(gradient, -weights * there)
    assert loss == pytest.approx(-(weights * there).sum(), abs=1e-15)
    assert metrics["ratio"][0] == metrics["ratio"][1] == np.count_nonzero(weights)
    assert metrics["kl_old"][0] == metrics["clipped_low"][0] == metrics["clipped_high"][0] == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "low", "high"),
    [
        (1.25, 1.0, False, False),  # above 1 + epsilon, below 1 + epsilon_high
        (1.3, 1.0, False, True),
        (1.3, -1.0, False, False),
        (9.0, -1.0, False, False),
        (0.85, -1.0, False, False),
        (0.75, -1.0, True, False),
        (0.75, 1.0, False, False),
        (0.01, 1.0, False, False),
        (9.0, 0.0, False, False),
    ],
)
def test_each_bound_acts_on_its_own_side_only(ratio, advantage, low, high):
    one = jnp.ones((1, 1))
    arguments = jnp.log(ratio) * one, 0 * one, advantage * one, one
    (loss, metrics), gradient = jax.device_get(value_and_gradient(*arguments, PolicyOptions()))
    assert (metrics["clipped_low"][0], metrics["clipped_high"][0]) == (low, high)
    if low or high:
        assert gradient == 0 and loss == pytest.approx(-advantage * (0.8 if low else 1.28), rel=1e-6)
    else:
        assert (gradient[0, 0], loss) == pytest.approx((-advantage * ratio,) * 2, rel=1e-6)
    # each bound moves with its own option alone
    for options in (PolicyOptions(epsilon=0.1), PolicyOptions(epsilon_high=0.2)):
        (_, moved), _ = value_and_gradient(*arguments, options)
        assert moved["clipped_low"][0] == (advantage < 0 and ratio < 1 - options.epsilon)
        assert moved["clipped_high"][0] == (advantage > 0 and ratio > 1 + options.epsilon_high)


def test_a_clipped_ratio_that_overflows_has_a_gradient_of_zero_and_old_log_probabilities_none():
    one = jnp.ones((1, 2))
    arguments = jnp.array([[200.0, 0.1]]), 0 * one, one, one
    (loss, _), gradient = value_and_gradient(*arguments, PolicyOptions())
    assert gradient[0, 0] == 0 and gradient[0, 1] < 0 and np.isfinite(loss)
    of_old = jax.grad(lambda old: policy_loss(arguments[0], old, one, one, PolicyOptions())[0])(0 * one)
    assert (of_old == 0).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_microbatches_change_nothing_in_an_update(loss_type):
    """Rows of very different lengths, so that dividing each microbatch by its own count would be seen."""
    rng, options = np.random.default_rng(2), PolicyOptions(loss_type=loss_type)
    _, old, advantage, weights = batch(loss_type)
    rows = {"hidden": rng.normal(size=(P * G, T, 3)), "labels": rng.integers(7, size=(P * G, T))}
    rows |= {"old": old, "advantage": advantage, "weights": weights}

    def loss(params, frozen, rows):
        new = label_logprobs(rows["hidden"], params["head"], rows["labels"])["logprob"]
        return policy_loss(new, rows["old"], rows["advantage"], rows["weights"], options)

    def update(microbatches):
        optimizer = optax.sgd(1.0)
        state = init_state({"head": jnp.asarray(np.random.default_rng(3).normal(size=(3, 7)))}, optimizer)
        before = np.asarray(state["params"]["head"])
        state, metrics = make_step(loss, optimizer, lambda _: 1.0, microbatches)(state, {}, rows)
        return np.asarray(state["params"]["head"]) - before, jax.device_get(metrics)

    with jax.enable_x64(True):
        (whole, metrics), (split, of_parts) = update(1), update(4)
    assert np.abs(whole).max() > 1e-3
    np.testing.assert_allclose(split, whole, rtol=0, atol=1e-15)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-14), of_parts, metrics)


@pytest.mark.parametrize("wrong", [dict(epsilon=0), dict(epsilon=1), dict(epsilon_high=-1), dict(loss_type="bnpo")])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PolicyOptions(**wrong)
