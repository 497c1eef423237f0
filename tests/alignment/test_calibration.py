"""Calibration of a judge on preferences of a known temperature."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from ministral_jax.alignment.calibration import (
    TEMPERATURES,
    calibration_floor,
    expected_calibration_error,
    fit_temperature,
    mean_probability,
)
from ministral_jax.errors import UserError

N = 20_000
sigmoid = lambda x: 1 / (1 + np.exp(-x))


def preferences(temperature, seed=0):
    """Logits of a judge, and outcomes drawn with the probabilities that they have at a temperature."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=N)
    return logits, (rng.random(N) < sigmoid(logits / temperature)).astype(int)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5, 8.0])
def test_the_temperature_is_found_within_its_standard_error_and_calibrates(temperature):
    """The Fisher information of log T is the sum of p (1 - p) z², z = logit / T; five standard errors are allowed.

    The ECE of a calibrated judge: the gaps of the 8 bins above 1/2 have variances that sum to at most N / 4, so that
    the mean of their absolute sum is below sqrt(8 N / 4), and its deviation below sqrt(N / 4); one more such deviation
    per standard error of T. An ECE of over five times that shows before.
    """
    logits, outcomes = preferences(temperature)
    found = fit_temperature(logits, outcomes)
    p = sigmoid(logits / temperature)
    error = 1 / np.sqrt(np.sum(p * (1 - p) * (logits / temperature) ** 2))
    assert abs(np.log(found / temperature)) < 5 * error < 0.2
    after = expected_calibration_error(sigmoid(logits / found), outcomes)
    assert after < (np.sqrt(8 / 4) + 5 / 2) / np.sqrt(N)
    if temperature != 1:
        assert expected_calibration_error(sigmoid(logits), outcomes) > 2 * after + 0.03


def test_the_fit_is_the_minimum_of_the_cross_entropy_and_scales_with_the_logits():
    logits, outcomes = preferences(1.7, seed=1)
    found = fit_temperature(logits, outcomes)
    z, inverse = logits / found, 1 / found
    slope, curvature = np.mean((sigmoid(z) - outcomes) * logits), np.mean(sigmoid(z) * sigmoid(-z) * logits**2)
    assert abs(slope / curvature) / inverse < 1e-5  # a Newton step from there, relative to 1 / T
    assert fit_temperature(3 * logits, outcomes) == pytest.approx(3 * found, rel=1e-5)
    assert fit_temperature(-logits, 1 - outcomes) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize(("noise", "bias"), [(0.0, 0.0), (1.0, 0.0), (2.0, 1.0), (0.0, 2.0)])
def test_the_mean_of_both_orders_is_calibrated_by_the_temperature_fitted_for_it(noise, bias):
    """A judge with independent errors in either order, that prefers place A: what one temperature can do for the mean
    is done, which that of either order leaves undone."""
    rng = np.random.default_rng(2)
    truth = 1.5 * rng.normal(size=N)
    outcomes = (rng.random(N) < sigmoid(truth)).astype(float)
    orders = np.stack([side * (truth + noise * rng.normal(size=N)) + bias for side in (1, -1)]) * [[1], [-1]]
    fitted = fit_temperature(orders, outcomes)
    entropy = lambda t: -np.mean(np.log(np.where(outcomes == 1, p := mean_probability(orders, t), 1 - p)))
    grid = np.geomspace(0.5, 8, 60)
    assert entropy(fitted) <= min(map(entropy, grid)) + 1e-9
    alone = fit_temperature(orders.ravel(), np.tile(outcomes, 2))
    errors = [expected_calibration_error(mean_probability(orders, t), outcomes) for t in (fitted, alone)]
    print(
        f"noise {noise:g}, bias {bias:g}: error {errors[1]:.4f} with the temperature of an order, now {errors[0]:.4f}"
    )
    if noise or bias:
        assert errors[0] < 0.6 * errors[1]
    else:
        assert fitted == pytest.approx(alone, rel=1e-4)
    # an ulp or two: SciPy and NumPy have an exponential each, and NumPy's depends on the processor
    np.testing.assert_allclose(mean_probability(orders, 2.0), sigmoid(orders / 2).mean(axis=0), rtol=1e-15)


def test_of_few_pairs_a_perfect_judge_shows_the_floor():
    rng = np.random.default_rng(3)
    p = sigmoid(1.2 * rng.normal(size=200))
    shown = [expected_calibration_error(p, (rng.random(200) < p).astype(float)) for _ in range(400)]
    floor = calibration_floor(p)
    assert abs(floor - np.mean(shown)) < 5 * np.std(shown) * np.sqrt(1 / 400 + 1 / 1000) and 0.04 < floor < 0.09
    assert calibration_floor(p) == floor  # the same draws
    assert calibration_floor(np.repeat(p, 100)) < floor / 5
    assert calibration_floor(np.array([0.0, 1.0])) == 0


def test_a_judge_without_errors_or_without_skill_ends_at_a_bound():
    logits = np.array([1.0, -2.0, 3.0, -1.0])
    assert fit_temperature(logits, np.array([1, 0, 1, 0])) == pytest.approx(TEMPERATURES[0], rel=1e-4)
    assert fit_temperature(logits, np.array([0, 1, 0, 1])) == pytest.approx(TEMPERATURES[1], rel=1e-4)


def test_the_calibration_error_by_hand():
    """Five bins: confidences 0.75 and 0.7 share (0.6, 0.8], one of them right; 0.95 is wrong, 1.0 right, both in the
    last bin; 0.5 is half right in (0.4, 0.6]."""
    p, outcomes = np.array([0.75, 0.3, 0.95, 0.0, 0.5]), np.array([1, 1, 0, 0, 0])
    want = (abs(1 - 1.45) + abs(1 - 1.95) + 0) / 5
    assert expected_calibration_error(p, outcomes, bins=5) == pytest.approx(want, abs=1e-15)
    assert expected_calibration_error(np.array([0.8]), np.array([1])) == pytest.approx(0.2)
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([1, 0])) == 0


@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])  # on a busy machine
@hypothesis.given(hnp.arrays(np.float64, 9, elements=st.floats(0, 1)), st.integers(0, 2**9 - 1), st.integers(1, 20))
def test_the_calibration_error_equals_a_loop_over_bins_and_does_not_know_a_from_b(p, bits, bins):
    outcomes = bits >> np.arange(9) & 1
    confidence = np.maximum(p, 1 - p)
    correct = np.where(p == 0.5, 0.5, (p > 0.5) == outcomes)
    want = 0.0
    for m in range(1, bins + 1):
        inside = (confidence * bins > m - 1) & (confidence * bins <= m)
        if inside.any():
            want += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(p, outcomes, bins) == pytest.approx(want, abs=1e-14)
    if (1 - (1 - p) == p).all():
        assert expected_calibration_error(1 - p, 1 - outcomes, bins) == pytest.approx(want, abs=1e-14)


@pytest.mark.parametrize(
    ("values", "outcomes", "said"),
    [
        ([], [], r"must be \[N\], N at least 1"),
        ([0.1, 0.2], [1], r"\(2,\) and outcomes \(1,\)"),
        ([0.1, np.nan], [1, 0], "must be finite, found nan"),
        ([0.1, 0.2], [1, 2], "outcome 2.0 must be 0 or 1"),
    ],
)
def test_what_cannot_be_fitted_is_refused(values, outcomes, said):
    for function in (fit_temperature, expected_calibration_error):
        with pytest.raises(UserError, match=said):
            function(np.array(values), np.array(outcomes))
    with pytest.raises(UserError, match=r"probability 1.5 must lie in \[0, 1\]"):
        expected_calibration_error(np.array([0.2, 1.5]), np.array([0, 1]))
