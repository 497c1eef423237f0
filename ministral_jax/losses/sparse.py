"""Losses against a teacher that is known in part: its top entries and the mass of the rest, or draws from it.

With K the ids that are kept and p_t, q_t the masses of teacher and student outside K (their tails), the divergence of
`TopK` targets is that of |K| + 1 buckets,

    KL_K = Σ_K p (log p - log q) + p_t (log p_t - log q_t),

a lower bound of the whole one by the chain rule KL(p‖q) = KL_K + p_t KL(p(.|tail)‖q(.|tail)). Its gradient in the
student's logits is q - p inside K and q(.|tail) (q_t - p_t) outside; it is the whole gradient with p_t q(.|tail) in
place of p there, so it differs from it by 2 p_t TV(p(.|tail), q(.|tail)) <= 2 p_t in L1 norm, token by token.

The divergence of `Sampled` targets, -Σ w log q(id) - H(p) with w the share of the draws, is an unbiased estimate of
KL(p‖q) if each id's expected share is its probability, and so is its gradient q - w (Anshumann et al. 2025,
arXiv:2503.16870). A single estimate may be negative.

Logits are [..., V], V may be cut over `axis` as in `divergences.py`, ids count the whole V. The arrays of size V are
the student's logits, a copy without K, and the gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from ministral_jax.losses.divergences import (
    Categorical,
    Comparison,
    Logits,
    Reduced,
    logsumexp,
    maximum,
    reduce_over,
    shard_count,
)
from ministral_jax.losses.targets import Sampled, TopK

Ids = Int[Array, "... W"]


def compare_topk(targets: TopK, q: Categorical, best: Reduced) -> Comparison:
    """Student q, whose highest logits are `best`, against `TopK` targets.

    The readings are `kl`, `agreement` (the student's top is the teacher's most probable entry, a tie on either side
    included) and `tail` (p_t).

    KL_K is computed as the sum over the buckets of p log(p/q) - p + q, which is the same as both sum to one. No term of
    it is negative, and its slope is zero at p = q: so KL_K >= 0 holds exactly, and what the rounding of logits and
    their sums adds to it vanishes where student and teacher agree.
    """
    log_p, log_tail = _normalised(targets, q)
    here, logits = _kept(targets.ids, q)
    log_q = logits - q.lse[..., None]
    without = _scatter(targets.ids, jnp.full_like(logits, -jnp.inf), q, q.logits, add=False)
    tail = logsumexp(without, q.axis)
    kept = reduce_over(jax.lax.psum, jnp.sum(jnp.where(here, _excess(log_p, log_q), 0), axis=-1), q.axis)
    value = kept + _excess(log_tail, tail - q.lse)

    is_top = here & (log_p == jnp.max(log_p, axis=-1, keepdims=True))
    at_top = maximum(jnp.where(is_top, logits, -jnp.inf), q.axis)
    agreement = (at_top == best).astype(value.dtype)

    # softmax over the tail, so that a tail of the student that underflows still has a gradient; without a tail: zeros
    in_tail = jnp.exp(without - jnp.where(jnp.isfinite(tail), tail, 0)[..., None])
    d_tail = jnp.exp(tail - q.lse) - jnp.exp(log_tail)
    d_logits = _scatter(targets.ids, jnp.exp(log_q) - jnp.exp(log_p), q, in_tail * d_tail[..., None], add=True)
    return {"kl": value, "agreement": agreement, "tail": jnp.exp(log_tail)}, value, d_logits


def compare_sampled(targets: Sampled, q: Categorical) -> Comparison:
    """Student q against `Sampled` targets; the reading `kl` is the divergence, an estimate."""
    counts = targets.counts.astype(q.lse.dtype)
    total = jnp.sum(counts, axis=-1, keepdims=True)
    share = counts / jnp.where(total > 0, total, 1)
    here, logits = _kept(targets.ids, q)
    surprise = jnp.sum(jnp.where(here, share * (q.lse[..., None] - logits), 0), axis=-1)
    value = reduce_over(jax.lax.psum, surprise, q.axis) - targets.entropy.astype(q.lse.dtype)
    return {"kl": value}, value, _scatter(targets.ids, -share, q, q.probabilities, add=True)


def _excess(log_p: Float[Array, "..."], log_q: Float[Array, "..."]) -> Float[Array, "..."]:
    """p log(p/q) - p + q >= 0, q where p is zero."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    ratio = jnp.where(p > 0, log_p - log_q, 0)
    # Neither form cancels where it is used; the first would overflow where q is far above p. That no term is negative
    # should not hang on how a backend rounds expm1.
    near = p * (ratio + jnp.expm1(-ratio))
    return jnp.maximum(jnp.where((p > 0) & (ratio > -1), near, q + p * (ratio - 1)), 0)


def _normalised(targets: TopK, q: Categorical) -> tuple[Float[Array, "... W"], Reduced]:
    """Log-probabilities of the kept ids and of the tail that sum to one."""
    log_p, tail = targets.logprobs.astype(q.lse.dtype), targets.tail.astype(q.lse.dtype)
    if targets.ids.shape[-1] == q.logits.shape[-1] * shard_count(q.axis):
        tail = jnp.full_like(tail, -jnp.inf)
    total = jnp.logaddexp(jax.nn.logsumexp(log_p, axis=-1), tail)
    return log_p - total[..., None], tail - total


def _own(ids: Ids, q: Categorical) -> Ids:
    """Ids as columns of this device; V, which is none of them, for those of others."""
    own = q.logits.shape[-1]
    columns = ids - (0 if q.axis is None else jax.lax.axis_index(q.axis) * own)
    return jnp.where((columns >= 0) & (columns < own), columns, own)


def _kept(ids: Ids, q: Categorical) -> tuple[Bool[Array, "... W"], Float[Array, "... W"]]:
    """Which of the ids are columns of this device, and the student's logits there; zero elsewhere."""
    columns = _own(ids, q)
    here = columns < q.logits.shape[-1]
    values = jnp.take_along_axis(q.logits, jnp.where(here, columns, 0), axis=-1)
    return here, jnp.where(here, values, 0)


def _scatter(ids: Ids, values: Float[Array, "... W"], q: Categorical, into: Logits, add: bool) -> Logits:
    """`into` with `values` set or added at this device's ids; those of other devices are dropped."""

    def one(into: Array, columns: Array, values: Array) -> Array:
        return into.at[columns].add(values, mode="drop") if add else into.at[columns].set(values, mode="drop")

    return jnp.vectorize(one, signature="(v),(w),(w)->(v)")(into, _own(ids, q), values)
