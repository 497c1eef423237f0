"""Group-relative policy optimisation as in Magistral: no KL term, no reference model.

Formulas: Magistral (arXiv 2506.10910, §2.1), DAPO (arXiv 2503.14476, eq. 8), Dr. GRPO (arXiv 2503.20783, §3), GRPO
(arXiv 2402.03300, eq. 3); names as in TRL. Letters: P prompts, G completions of each (a group), T tokens, B rows.

Advantages and the weights of tokens are made on the host, over the whole batch of an update. The loss of rows is then a
plain sum of weights times token losses, so that cutting a batch into microbatches or over devices changes nothing.
"""

from __future__ import annotations

from typing import Literal, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Shaped
from pydantic import Field

from ministral_jax.errors import UserError
from ministral_jax.losses.targets import DEFAULT_CHUNK, Metrics, PerToken
from ministral_jax.settings import Frozen

LossType = Literal["magistral", "dapo", "grpo", "dr_grpo"]
ScaleRewards = Literal["batch", "group", "none"]

_STD_FLOOR = 1e-6
"""Added to the standard deviation of rewards that an advantage is divided by."""


class PolicyOptions(Frozen):
    """How a policy follows its advantages.

    epsilon, epsilon_high: the ratio of new to old probability is clipped to [1 - epsilon, 1 + epsilon_high]; a higher
        upper bound ("clip-higher", DAPO §3.1; 0.26 to 0.28 in Magistral) leaves unlikely tokens room to grow.
    loss_type: how tokens are weighted, see `token_weights`.
    scale_rewards: what advantages are divided by, see `advantages`.
    chunk: tokens of a device whose logits are in memory at once, see `LossOptions`.
    """

    epsilon: float = Field(default=0.2, gt=0, lt=1)
    epsilon_high: float = Field(default=0.28, gt=0, allow_inf_nan=False)
    loss_type: LossType = "magistral"
    scale_rewards: ScaleRewards = "batch"
    chunk: int = Field(default=DEFAULT_CHUNK, ge=1)


# ---- on the host: over the whole batch of an update -----------------------------------------------------------------


def with_signal(rewards: Float[np.ndarray, "P G"]) -> Bool[np.ndarray, " P"]:
    """Which groups have two rewards or more (NaN is none) that differ: the others say nothing about what is better."""
    present = ~np.isnan(rewards)
    return np.where(present, rewards, -np.inf).max(axis=1) > np.where(present, rewards, np.inf).min(axis=1)


def advantages(
    rewards: Float[np.ndarray, "P G"], scale_rewards: ScaleRewards
) -> tuple[Float[np.ndarray, "P G"], Bool[np.ndarray, " P"]]:
    """Advantages (float64, 0 where left out) and which groups are kept.

    The advantage is the reward less the mean of its group. A group is kept when it is one `with_signal`; the advantages
    of another are 0 and `token_weights` gives it no weight.
    `scale_rewards` then divides by a (population) standard deviation, plus 1e-6: "batch", as in Magistral, by that of
    the advantages of all kept groups, less their mean; "group", as in GRPO, by that of the group's own rewards.

    Args:
        rewards: NaN is a completion to be left out, whose tokens must not be counted in `token_weights`.

    Raises:
        UserError: a reward is infinite, or `rewards` is not `[P, G]`.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2 or np.isinf(rewards).any():
        raise UserError(f"rewards of shape {rewards.shape} must be [P, G] and finite, or NaN where left out")
    present = ~np.isnan(rewards)
    kept = with_signal(rewards)
    used = present & kept[:, None]
    centred = _centred(np.where(present, rewards, 0), used, axis=1)
    if scale_rewards == "batch":
        centred = _centred(centred, used, axis=None)
    if scale_rewards != "none":
        axis = None if scale_rewards == "batch" else 1
        count = np.maximum(used.sum(axis=axis, keepdims=True), 1)
        centred /= np.sqrt(np.square(centred).sum(axis=axis, keepdims=True) / count) + _STD_FLOOR
    return centred, kept


def token_weights(
    mask: Shaped[np.ndarray, "P G T"], kept: Bool[np.ndarray, " P"], loss_type: LossType, limit: int
) -> Float[np.ndarray, "P G T"]:
    """Weights (float64) of the token losses: they sum to 1, or are all 0 when nothing is counted.

    - "magistral": every kept group has the same weight, shared evenly by all its tokens (Magistral §2.1: the loss is
      divided by the tokens of the group).
    - "dapo": all tokens of kept groups weigh the same (DAPO §3.3).
    - "grpo": every completion of a kept group has the same weight, shared evenly by its tokens.
    - "dr_grpo": every token of a kept group weighs 1 / (completions * `limit`), which does not depend on lengths; these
      weights sum to the mean length over `limit`, not to 1.

    Groups and completions without a counted token have no part in these counts.

    Args:
        mask: 1 at the completion tokens that count and 0 elsewhere.
        kept: from `advantages`.
        limit: tokens that a completion was allowed (TRL's `max_completion_length`); of use to "dr_grpo" alone.

    Raises:
        UserError: shapes do not fit together.
    """
    if np.ndim(mask) != 3 or np.shape(kept) != np.shape(mask)[:1]:
        raise UserError(f"mask {np.shape(mask)} and kept {np.shape(kept)} must be [P, G, T] and [P]")
    counted = ((np.asarray(mask) != 0) & np.asarray(kept, bool)[:, None, None]).astype(np.float64)
    per_completion = counted.sum(axis=2, keepdims=True)
    match loss_type:
        case "magistral":
            per_group = counted.sum(axis=(1, 2), keepdims=True)
            shares = per_group * np.count_nonzero(per_group)
        case "dapo":
            shares = counted.sum()
        case "grpo":
            shares = per_completion * np.count_nonzero(per_completion)
        case "dr_grpo":
            shares = np.float64(np.count_nonzero(per_completion) * limit)
        case _:
            assert_never(loss_type)
    return counted / np.maximum(shares, 1)


def _centred(values: np.ndarray, used: np.ndarray, axis: int | None) -> np.ndarray:
    """`values` less their mean over what is used; 0 elsewhere."""
    count = np.maximum(used.sum(axis=axis, keepdims=True), 1)
    mean = np.where(used, values, 0).sum(axis=axis, keepdims=True) / count
    return np.where(used, values - mean, 0)


# ---- on the device: any part of the batch ---------------------------------------------------------------------------


def policy_loss(
    logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, weights: PerToken, options: PolicyOptions
) -> tuple[Array, Metrics]:
    """Sum of weights times -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A), and metrics as (sum, count).

    The ratio is exp(logprobs - old_logprobs); A is the advantage. Differentiable in `logprobs` alone. Where the weight
    is 0 nothing is added to sums and gradients, whatever the other arrays hold there.

    Metrics, which add up over parts of a batch and carry no gradient: `loss`, of which the count is the sum of the
    weights (at most 1 over the whole batch); and means over the tokens with a weight: `ratio`; `clipped_low` and
    `clipped_high`, the shares whose gradient the lower and the upper bound cut; and `kl_old`, KL(old‖new) by the
    estimator (r - 1) - log r, which is unbiased and never negative ("k3" of Schulman 2020,
    http://joschu.net/blog/kl-approx.html).

    The loss has no lower bound where A < 0 and the ratio grows, as in the papers.
    """
    counted = weights != 0
    there = lambda x: jnp.where(counted, x, 0)
    logprobs, old, advantage = there(logprobs), there(jax.lax.stop_gradient(old_logprobs)), there(advantages)
    log_ratio = logprobs - old
    low, high = 1 - options.epsilon, 1 + options.epsilon_high
    free = jnp.exp(jax.lax.stop_gradient(log_ratio))
    clipped_low, clipped_high = (advantage < 0) & (free < low), (advantage > 0) & (free > high)
    # The clipped branch has a gradient of zero; a ratio that overflows would make it 0 * inf.
    ratio = jnp.exp(jnp.where(clipped_low | clipped_high, 0, log_ratio))
    chosen = jnp.where(clipped_low, low, jnp.where(clipped_high, high, ratio))
    loss = -jnp.sum(weights * advantage * chosen)
    readings = {
        "ratio": free,
        "clipped_low": clipped_low,
        "clipped_high": clipped_high,
        "kl_old": jnp.expm1(log_ratio) - log_ratio,
    }
    count = jnp.sum(counted, dtype=loss.dtype)
    metrics = {"loss": (loss, jnp.sum(weights))}
    metrics |= {name: (jnp.sum(there(x), dtype=loss.dtype), count) for name, x in readings.items()}
    return loss, jax.lax.stop_gradient(metrics)
