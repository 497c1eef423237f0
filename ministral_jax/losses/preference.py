"""Direct preference optimisation, online and offline, on pairs of completions whose preference is a probability.

The Ministral 3 paper (arXiv 2601.08584, §3.2) weighs a two-sided loss by the judge's probability that A is better,
makes a looping response the loser, and rescales the loss by beta. With a certain judge it is DPO (arXiv 2305.18290,
eq. 7). `decide` runs on the host, `preference_loss` on the device, on any part of a batch. P counts pairs.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import entr, logit
from jaxtyping import Bool, Float
from pydantic import Field

from ministral_jax.errors import UserError
from ministral_jax.losses.targets import Metrics
from ministral_jax.settings import Frozen


class PreferenceOptions(Frozen):
    """How a policy follows preferences.

    beta: scale of the log-ratios of policy to reference; a larger one holds the policy closer to the reference.
    loss_type: "odpo" weighs both sides by the judge's probability p; the others take its verdict for certain. "sigmoid"
        is DPO; "ipo" draws the difference of the log-ratios to 1 / (2 beta) (arXiv 2310.12036, eq. 17); "offset" asks
        for a margin of logit p, as if p were of Bradley and Terry the difference of rewards (arXiv 2402.10571, eq. 3).
    rescale_beta: divide the loss by `beta`, so that its gradient where policy and reference agree does not depend on
        `beta`; not of "ipo". Adam takes no notice of a constant factor: what this changes is which steps
        `optimizer.clip` cuts, as if it were `beta` times as large without. The paper names a rescaling that makes the
        loss "more beta-invariant" and gives no formula: this one is an interpretation.
    """

    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    loss_type: Literal["odpo", "sigmoid", "ipo", "offset"] = "odpo"
    rescale_beta: bool = True

    @property
    def uses_probability(self) -> bool:
        """Whether it matters how sure a verdict is."""
        return self.loss_type in ("odpo", "offset")


MOST = float(np.log(999))
"""The largest offset, that of a probability of 0.999: of a certain verdict it would be infinite."""


def decide(
    probability: Float[np.ndarray, " P"], a_loops: Bool[np.ndarray, " P"], b_loops: Bool[np.ndarray, " P"]
) -> tuple[Float[np.ndarray, " P"], Bool[np.ndarray, " P"]]:
    """The probability (float64) that A is better, and which pairs are kept.

    A looping response is the loser whatever the judge says. A pair is left out, with a probability of 1/2, when both
    loop, or when neither does and the judge gave none (NaN).

    Raises:
        UserError: a probability lies outside [0, 1].
    """
    probability = np.asarray(probability, np.float64)
    a_loops, b_loops = np.asarray(a_loops, bool), np.asarray(b_loops, bool)
    if (wrong := probability[(probability < 0) | (probability > 1)]).size:
        raise UserError(f"preference {wrong[0]} must be a probability in [0, 1], or NaN where there is none")
    probability = np.where(a_loops == b_loops, probability, b_loops)
    kept = ~(a_loops & b_loops) & ~np.isnan(probability)
    return np.where(kept, probability, 0.5), kept


Pair = tuple[Float[Array, " P"], Float[Array, " P"]]
"""Summed log-probabilities of the completions A and B (nats)."""


def preference_loss(
    policy: Pair,
    reference: Pair,
    probability: Float[Array, " P"],
    weights: Float[Array, " P"],
    options: PreferenceOptions,
) -> tuple[Array, Metrics]:
    """Sum of weights times p a + (1 - p) b, and metrics as (sum, count): a is the loss of a pair whose A is better, b
    that of one whose B is.

    With Δ = (policy A - reference A) - (policy B - reference B) and the margin βΔ they are -log σ(βΔ) and -log σ(-βΔ),
    over β with `rescale_beta`; of "offset" those of βΔ - logit p; of "ipo" (Δ - 1 / 2β)² and (Δ + 1 / 2β)². p is the
    probability that A is better, which all but "odpo" harden to 0 or 1, and leave 1/2. Differentiable in the policy's
    log-probabilities alone. Where the weight is 0 nothing is added to sums and gradients, whatever the other arrays
    hold there.

    Metrics, weighted means which add up over parts of a batch and carry no gradient: `loss`; `entropy_floor`, the
    entropy of p (over β), which is the lower bound of "odpo"; and by TRL's names, over the pairs with p ≠ 1/2:
    `rewards/chosen` and `rewards/rejected`, β times the log-ratio of the preferred response and of the other one;
    `rewards/margins`, their difference; and `rewards/accuracies`, the share whose margin is positive, where a margin of
    0 is one half.
    """
    counted = weights != 0
    there = lambda x: jnp.where(counted, x, 0)
    fixed = lambda x: jax.lax.stop_gradient(there(x))
    p, scale = fixed(probability), weights
    side = jnp.sign(p - 0.5)
    offset = jnp.clip(logit(p), -MOST, MOST) if options.loss_type == "offset" else 0
    if options.loss_type != "odpo":
        p = (1 + side) / 2
    log_ratio_a, log_ratio_b = (there(ours) - fixed(theirs) for ours, theirs in zip(policy, reference, strict=True))
    # Not the difference of two products: of equals, fused with the subtraction, it leaves the rounding of one.
    delta = log_ratio_a - log_ratio_b
    margin = options.beta * delta
    if options.loss_type == "ipo":
        wanted = 1 / (2 * options.beta)
        a, b = (delta - wanted) ** 2, (delta + wanted) ** 2
    else:
        a, b = -jax.nn.log_sigmoid(margin - offset), -jax.nn.log_sigmoid(offset - margin)
        scale = weights / options.beta if options.rescale_beta else weights
    loss = jnp.sum(scale * (p * a + (1 - p) * b))
    decided = weights * jnp.abs(side)
    over = lambda weights, x: (jnp.sum(weights * x), jnp.sum(weights))
    metrics = {
        "loss": (loss, jnp.sum(weights)),
        "entropy_floor": (jnp.sum(scale * (entr(p) + entr(1 - p))), jnp.sum(weights)),
        "rewards/chosen": over(decided, options.beta * jnp.where(side > 0, log_ratio_a, log_ratio_b)),
        "rewards/rejected": over(decided, options.beta * jnp.where(side > 0, log_ratio_b, log_ratio_a)),
        "rewards/margins": over(decided, side * margin),
        "rewards/accuracies": over(decided, (1 + jnp.sign(side * margin)) / 2),
    }
    return loss, jax.lax.stop_gradient(metrics)
