"""Log-probabilities of given tokens from hidden states; no `[tokens, vocab]` array ever exists.

The gradient of a log-probability is scaled token by token with what the caller makes of it, so unlike in `chunked.py`
it cannot be taken in the forward pass: the backward pass makes a chunk's logits once more. Kept between the two are the
logsumexps `[B, T]`. Four matrix products per chunk: logits twice, `d_hidden` and `d_head`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ministral_jax.errors import UserError
from ministral_jax.losses.chunked import (
    Inputs,
    accumulator,
    chunk_logits,
    cut_tokens,
    join_tokens,
    vary_alike,
    where_counted,
)
from ministral_jax.losses.divergences import Axis, categorical, logit_at, reduce_over
from ministral_jax.losses.targets import DEFAULT_CHUNK, Head, Labels, PerToken, States, check_shapes

Readings = tuple[PerToken, PerToken, PerToken]
"""Log-probability, entropy and logsumexp."""


def label_logprobs(
    hidden: States,
    head: Head,
    labels: Labels,
    temperature: float = 1.0,
    chunk: int = DEFAULT_CHUNK,
    vocab_axis: Axis = None,
) -> dict[str, PerToken]:
    """`logprob`, log softmax(logits / temperature) at the label, and `entropy` of that distribution.

    Both are in nats and float32 (float64 for float64 hidden states). `logprob` is differentiable in `hidden` and
    `head`, once; `entropy` carries no gradient.

    Args:
        hidden: final hidden states, any float dtype, in which the products run.
        head: output matrix (`embed.T` when tied); its gradient is summed in float32.
        labels: in `[0, V)`. Where a label is outside, or hidden states are NaN, `logprob` means
            nothing; a position whose `logprob` is not used adds exactly nothing to the gradients, whatever it holds.
        chunk: how many tokens, over all local rows, have their logits in memory at once.
        vocab_axis: the `shard_map` axis that cuts V of the head; labels count the whole V.

    Raises:
        UserError: shapes do not fit together, or the temperature is not positive.
    """
    check_shapes(hidden, head, None, labels)
    if not 0 < temperature < float("inf"):
        raise UserError(f"label_logprobs: temperature {temperature} must be positive and finite")
    hidden, head, _, labels, _ = vary_alike(Inputs(hidden, head, None, labels, None), vocab_axis)
    logprob, entropy, _ = _label(hidden, head, labels, temperature, chunk, vocab_axis)
    return {"logprob": logprob, "entropy": entropy}


def _label_value(hidden: Array, head: Array, labels: Array, temperature: float, chunk: int, axis: Axis) -> Readings:
    kernel = head.astype(hidden.dtype)

    def read(_: None, arrays: tuple[Array, Array]) -> tuple[None, Readings]:
        x, y = arrays
        q = categorical(chunk_logits(x, kernel) / temperature, axis)
        entropy = -reduce_over(jax.lax.psum, jnp.sum(q.probabilities * q.log, axis=-1), axis)
        return None, (logit_at(y - _first(kernel, axis), q.logits, axis) - q.lse, entropy, q.lse)

    with jax.named_scope("label_logprobs"):
        _, readings = jax.lax.scan(read, None, cut_tokens((hidden, labels), chunk))
    logprob, entropy, lse = (join_tokens(x, labels.shape[1]) for x in readings)
    return logprob, entropy, lse


def _label_forward(
    hidden: Array, head: Array, labels: Array, temperature: float, chunk: int, axis: Axis
) -> tuple[Readings, tuple[Array, ...]]:
    readings = _label_value(hidden, head, labels, temperature, chunk, axis)
    return readings, (hidden, head, labels, readings[-1])


def _label_backward(
    temperature: float, chunk: int, axis: Axis, kept: tuple[Array, ...], cotangents: Readings
) -> tuple[Array, Array, None]:
    """d logprob / d logits = (1[v = label] - q_v) / temperature, with q from the logsumexp: no reduction over V."""
    hidden, head, labels, lse = kept
    dtype, kernel = accumulator(hidden), head.astype(hidden.dtype)
    columns = jnp.arange(head.shape[1])

    def accumulate(d_head: Array, arrays: tuple[Array, ...]) -> tuple[Array, Array]:
        scale = arrays[-1]
        x, y, lse = jax.tree.map(partial(where_counted, scale), arrays[:-1])
        q = jnp.exp(chunk_logits(x, kernel) / temperature - lse[..., None])
        is_label = columns == (y - _first(kernel, axis))[..., None]
        d_logits = (scale[..., None] / temperature * (is_label - q)).astype(x.dtype)
        d_x = jnp.einsum("bcv,dv->bcd", d_logits, kernel, preferred_element_type=dtype)
        d_head += jnp.einsum("bcd,bcv->dv", x, d_logits, preferred_element_type=dtype)
        return d_head, d_x.astype(x.dtype)

    with jax.named_scope("label_logprobs_gradient"):
        start = jnp.zeros_like(head, dtype=dtype)
        d_head, d_hidden = jax.lax.scan(accumulate, start, cut_tokens((hidden, labels, lse, cotangents[0]), chunk))
    return join_tokens(d_hidden, hidden.shape[1]), d_head.astype(head.dtype), None


_label = jax.custom_vjp(_label_value, nondiff_argnums=(3, 4, 5))
_label.defvjp(_label_forward, _label_backward)


def _first(kernel: Array, axis: Axis) -> Array | int:
    """Which id is this device's first column."""
    return 0 if axis is None else jax.lax.axis_index(axis) * kernel.shape[-1]
