"""Calibration of a judge's probabilities on pairs whose better response is known.

Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599): temperature scaling (§4.2) and the
expected calibration error (eq. 3). N counts pairs, O the orders in which a pair is asked about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ministral_jax.errors import UserError
from ministral_jax.lazy import Lazy

if TYPE_CHECKING:
    from scipy import optimize, special
else:
    optimize, special = Lazy("scipy.optimize"), Lazy("scipy.special")

TEMPERATURES = (0.05, 20.0)
"""Where a temperature is looked for; a judge that is always right, or no better than chance, ends up at a bound."""
_GRID = 64
"""Temperatures tried first: of a mean over orders the cross-entropy may have several minima."""


def mean_probability(logits: np.ndarray, temperature: float) -> np.ndarray:
    """`[N]`: that A is better, the mean over orders of sigmoid(logit / temperature).

    Args:
        logits: `[O, N]`, log-odds that A is better, in every order.
    """
    return special.expit(np.asarray(logits, np.float64) / temperature).mean(axis=0)


def fit_temperature(logits: np.ndarray, outcomes: np.ndarray) -> float:
    """The temperature, within `TEMPERATURES`, that minimises the binary cross-entropy of `mean_probability`, which is
    what a judge is used with.

    Args:
        logits: `[O, N]` or `[N]`, log-odds that A is better.
        outcomes: `[N]`, 1 where A is better, 0 where B is.

    Raises:
        UserError: nothing to fit, shapes differ, a logit is not finite, or an outcome is neither 0 nor 1.
    """
    orders = [_checked("logits", of_order, outcomes) for of_order in np.atleast_2d(logits)]
    towards = np.stack([values for values, _ in orders]) * (2 * orders[0][1] - 1)  # the right answer

    def cross_entropy(log_temperature: float) -> float:
        scaled = towards / np.exp(log_temperature)
        return float(np.mean(np.log(len(orders)) - np.logaddexp.reduce(-np.logaddexp(0, -scaled), axis=0)))

    low, high = np.log(TEMPERATURES)
    grid = np.linspace(low, high, _GRID)
    best = int(np.argmin([cross_entropy(place) for place in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]
    found = optimize.minimize_scalar(cross_entropy, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def expected_calibration_error(probabilities: np.ndarray, outcomes: np.ndarray, bins: int = 15) -> float:
    """Mean of |accuracy - confidence| over bins of equal width in (0, 1], weighted by the pairs in them.

    The confidence is that in the likelier response, so no pair lies below 1/2. At 1/2 the prediction is half right.

    Args:
        probabilities: `[N]` in [0, 1], that A is better.
        outcomes: `[N]`, 1 where A is better, 0 where B is.

    Raises:
        UserError: as in `fit_temperature`, or a probability lies outside [0, 1].
    """
    probabilities, outcomes = _checked("probabilities", probabilities, outcomes)
    if (wrong := probabilities[(probabilities < 0) | (probabilities > 1)]).size:
        raise UserError(f"calibration: probability {wrong[0]} must lie in [0, 1]")
    return float(_errors(probabilities, outcomes[None], bins)[0])


def calibration_floor(probabilities: np.ndarray, bins: int = 15, draws: int = 1000) -> float:
    """The expected calibration error that a judge of these probabilities would show if they were true: its mean over
    outcomes drawn with them. Of few pairs it is far from 0, so an error says something only above it.

    Args:
        probabilities: `[N]` in [0, 1], that A is better.
    """
    outcomes = np.random.default_rng(0).random((draws, len(probabilities))) < probabilities
    return float(_errors(np.asarray(probabilities, np.float64), outcomes.astype(np.float64), bins).mean())


def _errors(probabilities: np.ndarray, outcomes: np.ndarray, bins: int) -> np.ndarray:
    """`[D]`: of outcomes `[D, N]`."""
    confidence = np.maximum(probabilities, 1 - probabilities)
    correct = (1 + np.sign(probabilities - 0.5) * (2 * outcomes - 1)) / 2
    index = np.ceil(confidence * bins).astype(int) - 1  # bin m holds ((m - 1) / M, m / M]
    gaps = (correct - confidence) @ (index[:, None] == np.arange(bins))
    return np.abs(gaps).sum(axis=1) / len(probabilities)


def _checked(name: str, values: np.ndarray, outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, outcomes = np.asarray(values, np.float64), np.asarray(outcomes, np.float64)
    if values.ndim != 1 or values.shape != outcomes.shape or not values.size:
        raise UserError(f"calibration: {name} {values.shape} and outcomes {outcomes.shape} must be [N], N at least 1")
    if not np.isfinite(values).all():
        raise UserError(f"calibration: {name} must be finite, found {values[~np.isfinite(values)][0]}")
    if (wrong := outcomes[(outcomes != 0) & (outcomes != 1)]).size:
        raise UserError(f"calibration: outcome {wrong[0]} must be 0 or 1")
    return values, outcomes
