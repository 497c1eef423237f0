"""Distillation and cross-entropy losses on hidden states; no `[tokens, vocab]` array ever exists.

The head is applied to one chunk of the sequence at a time. When the loss is differentiated, the gradient of a chunk is
taken while its logits are still there (in the forward pass, as Liger Kernel does): what is kept for the backward pass
is `d_hidden [B, T, D]` and `d_head [D, V]`, which it only scales. So there are four matrix products per chunk, none of
them twice: student logits, teacher logits, `d_hidden`, `d_head`.

Sums, metrics and `d_head` are carried in float32 (float64 for float64 hidden states), whatever the inputs are; products
run in the dtype of the hidden states. Only the student's hidden states and head are differentiated, once.

Inside `jax.shard_map` (see `sharded.py`), with rows split over devices, sums and metrics are those of the device's own
rows, to be added with `psum`; a head that is replicated over these devices receives the sum of their gradients. Plain
`jit` over a sharded batch gives the same numbers, but reduces `d_head` over the devices once per chunk. `vocab_axis`
names the mesh axis over which V is cut, both heads' alike: the only collectives are then reductions of [B, c] numbers
over it, and the gradient of a head has the device's own columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from ministral_jax.distillation.targets import DEFAULT_CHUNK, Dense, Hidden, LossOptions, Targets, check_shapes

__all__ = ["Dense", "Hidden", "LossOptions", "Targets", "cross_entropy", "distillation_loss", "evaluate_positions"]

Metrics = dict[str, tuple[Array, Array]]
Axis = str | tuple[str, ...] | None


def distillation_loss(
    hidden: Array,
    head: Array,
    targets: Targets,
    labels: Array,
    mask: Array,
    options: LossOptions,
    vocab_axis: Axis = None,
) -> tuple[Array, Metrics]:
    """Sum of the distillation loss over counted tokens, and metrics as (sum, count).

    Args:
        hidden: student's final hidden states `[B, T, D]`, any float dtype.
        head: student's output matrix `[D, V]` (`embed.T` when tied); cast to the dtype of `hidden` for the products.
        targets: the teacher, constant.
        labels: `[B, T]` integers in `[0, V)`; ignored where masked.
        mask: `[B, T]` weights. A token of weight 0 adds exactly nothing to sums and gradients, even if its hidden
            states (the teacher's too) are NaN.
        vocab_axis: the `shard_map` axis that cuts V of both heads (and of dense targets); labels count the whole V.

    Returns:
        The scalar sum, to be divided by a metric's count for a mean, and the metrics `kl` (always KL(teacher‖student)
        at temperature 1, so that objectives compare), `ce`, and `agreement` (the teacher's top token is the student's,
        an exact tie included). Metrics carry no gradient.

    Raises:
        UserError: shapes do not fit together.
    """
    check_shapes(hidden, head, targets, labels, mask)
    loss, sums, count = _loss(*_vary_alike(hidden, head, targets, labels, mask, vocab_axis), options, vocab_axis)
    return loss, {name: (sums[name], count) for name in ("kl", "ce", "agreement")}


def cross_entropy(
    hidden: Array,
    head: Array,
    labels: Array,
    mask: Array,
    chunk: int = DEFAULT_CHUNK,
    vocab_axis: Axis = None,
) -> tuple[Array, Metrics]:
    """Sum of the cross-entropy (nats) over counted tokens, and metrics `ce` and `accuracy` as (sum, count).

    `accuracy` counts the labels that are the student's top token, an exact tie included. Shapes, dtypes, masking and
    errors as in `distillation_loss`.
    """
    check_shapes(hidden, head, None, labels, mask)
    options = LossOptions(ce_weight=1, chunk=chunk)
    loss, sums, count = _loss(*_vary_alike(hidden, head, None, labels, mask, vocab_axis), options, vocab_axis)
    return loss, {name: (sums[name], count) for name in ("ce", "accuracy")}


def evaluate_positions(
    hidden: Array,
    head: Array,
    targets: Targets | None,
    labels: Array,
    chunk: int = DEFAULT_CHUNK,
    vocab_axis: Axis = None,
) -> dict[str, Array]:
    """Readings at every position, each `[B, T]`. Nothing is masked. Shapes and errors as in `distillation_loss`.

    `ce` is -log q(label) and, when targets are given, `kl` is KL(teacher‖student), both in nats at temperature 1;
    `prediction` (int32) is the student's argmax, and `correct` is 1 where it is the label, else 0. All but `prediction`
    are float32 (float64 for float64 hidden states).
    """
    check_shapes(hidden, head, targets, labels)
    rows, teacher_kernel = _unpack(targets)
    kernel, options = head.astype(hidden.dtype), LossOptions(ce_weight=1, chunk=chunk)

    def read(_, arrays):
        readings, _ = _chunk_losses(arrays, kernel, teacher_kernel, options, vocab_axis)
        return None, {name: readings[name] for name in ("ce", "prediction", "kl") if name in readings}

    with jax.named_scope("loss_head"):
        _, readings = jax.lax.scan(read, None, _cut((hidden, rows, labels), chunk))
    readings = {name: _join(x, labels.shape[1]) for name, x in readings.items()}
    return readings | {"correct": (readings["prediction"] == labels).astype(readings["ce"].dtype)}


# ---- logits of one chunk: values and explicit gradients -------------------------------------------------------------


class _Categorical(NamedTuple):
    """A distribution over V as unnormalised log-probabilities [..., V], cut over `axis`, and their logsumexp [...]."""

    logits: Array
    lse: Array
    axis: Axis

    @property
    def log(self) -> Array:
        return self.logits - self.lse[..., None]

    @property
    def probabilities(self) -> Array:
        return jnp.exp(self.log)


def _categorical(logits: Array, axis: Axis) -> _Categorical:
    lse = jax.nn.logsumexp(logits, axis=-1)
    if axis is not None:
        top = jax.lax.pmax(lse, axis)
        lse = top + jnp.log(jax.lax.psum(jnp.exp(lse - top), axis))
    return _Categorical(logits, lse, axis)


def _mean(weights: Array, x: Array, axis: Axis) -> Array:
    """Mean over V; dividing by the sum of the weights takes out the rounding of `lse` that all of them share."""
    total = _across(jax.lax.psum, jnp.sum(weights * x, axis=-1), axis)
    return total / _across(jax.lax.psum, jnp.sum(weights, axis=-1), axis)


def _across(collective: Callable, x: Array, axis: Axis) -> Array:
    """What the devices have of a reduction over V, reduced over them."""
    return x if axis is None else collective(x, axis)


def _top(logits: Array, axis: Axis) -> Array:
    return _across(jax.lax.pmax, jnp.max(logits, axis=-1), axis)


def _forward_kl(p: _Categorical, q: _Categorical, options: LossOptions) -> tuple[Array, Array]:
    """KL(p‖q) = Σ p (log p - log q) [...] and its gradient q - p with respect to the logits of q [..., V]."""
    weights = p.probabilities
    value = _mean(weights, p.logits - q.logits, q.axis) - p.lse + q.lse
    return value, q.probabilities - weights


def _reverse_kl(p: _Categorical, q: _Categorical, options: LossOptions) -> tuple[Array, Array]:
    """KL(q‖p) [...] and its gradient q (log q - log p - KL) with respect to the logits of q [..., V]."""
    weights, ratio = q.probabilities, q.logits - p.logits
    mean = _mean(weights, ratio, q.axis)
    return mean - q.lse + p.lse, weights * (ratio - mean[..., None])


def _jsd(p: _Categorical, q: _Categorical, options: LossOptions) -> tuple[Array, Array]:
    """β KL(p‖m) + (1 - β) KL(q‖m) [...] and its gradient with respect to the logits of q [..., V].

    dJSD/dq = (1 - β) log(q/m), since what comes through m cancels: the gradient of (1 - β) KL(q‖m) with m held fixed.
    """
    beta = options.jsd_beta
    mixture = jnp.logaddexp(p.log + math.log(beta), q.log + math.log1p(-beta))
    m = _Categorical(mixture, jnp.zeros_like(q.lse), q.axis)
    student, d_logits = _reverse_kl(m, q, options)
    return beta * _forward_kl(p, m, options)[0] + (1 - beta) * student, (1 - beta) * d_logits


_DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}


def _chunk_losses(arrays, kernel, teacher_kernel, options: LossOptions, axis: Axis) -> tuple[dict[str, Any], Any]:
    """Readings [B, c] by name, `loss` among them, and the gradient of `loss` in the student's logits [B, c, V].

    What a caller leaves unused (the gradient, a reading) is not computed under `jit` and inside `scan`.
    """
    hidden, rows, labels = arrays
    student = _logits(hidden, kernel)
    first = 0 if axis is None else jax.lax.axis_index(axis) * student.shape[-1]
    q, top = _categorical(student, axis), _top(student, axis)
    at_label = _at(labels - first, student, axis)
    ce = q.lse - at_label
    prediction = _first_of(top, student, first, axis)
    readings = {"ce": ce, "accuracy": (at_label == top).astype(ce.dtype), "prediction": prediction}
    losses, gradients = [], []
    if options.ce_weight > 0:
        is_label = jnp.arange(student.shape[-1]) == (labels - first)[..., None]
        losses.append(options.ce_weight * ce)
        gradients.append(options.ce_weight * (q.probabilities - is_label))
    if rows is not None:
        teacher = rows if teacher_kernel is None else _logits(rows, teacher_kernel)
        p = _categorical(teacher.astype(student.dtype), axis)
        readings["kl"] = _forward_kl(p, q, options)[0]
        # one fused pass, where two argmaxes would cost as much as a matrix product on CPU
        is_teacher_top = p.logits == _top(p.logits, axis)[..., None]
        at_teacher_top = _top(jnp.where(is_teacher_top, student, -jnp.inf), axis)
        readings["agreement"] = (at_teacher_top == top).astype(ce.dtype)
        if options.ce_weight < 1:
            tau, weight = options.temperature, 1 - options.ce_weight
            if tau != 1:
                p, q = _categorical(p.logits / tau, axis), _categorical(student / tau, axis)
            value, d_logits = _DIVERGENCES[options.objective](p, q, options)
            losses.append(weight * tau**2 * value)
            gradients.append(weight * tau * d_logits)
    return readings | {"loss": sum(losses)}, sum(gradients)


def _at(index: Array, logits: Array, axis: Axis) -> Array:
    """Value [...] of logits [..., V] at an index that counts from the first column of this device."""
    if axis is None:
        return jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
    here = (index >= 0) & (index < logits.shape[-1])
    value = jnp.take_along_axis(logits, jnp.where(here, index, 0)[..., None], axis=-1)[..., 0]
    return jax.lax.psum(jnp.where(here, value, 0), axis)


def _first_of(top: Array, logits: Array, first: Array | int, axis: Axis) -> Array:
    """Index of the maximum [...] in logits [..., V]: jnp.argmax as a plain reduction, four times as fast on CPU."""
    own = logits.shape[-1]
    last = (own if axis is None else own * jax.lax.axis_size(axis)) - 1
    candidates = jnp.where(logits == top[..., None], first + jnp.arange(own, dtype=jnp.int32), last)
    return _across(jax.lax.pmin, jnp.min(candidates, axis=-1), axis)


def _logits(hidden: Array, kernel: Array) -> Array:
    """[B, c, D] x [D, V] -> [B, c, V] in the accumulator's dtype."""
    return jnp.einsum("bcd,dv->bcv", hidden, kernel, preferred_element_type=_accumulator(hidden))


# ---- sums over all chunks, with the gradient taken on the way -------------------------------------------------------


def _loss_value(hidden, head, targets, labels, mask, options, axis):
    """(loss sum, sums of the readings by name, sum of weights)."""
    return _scan_loss(hidden, head, targets, labels, mask, options, axis, with_gradient=False)[0]


def _loss_forward(hidden, head, targets, labels, mask, options, axis):
    return _scan_loss(hidden, head, targets, labels, mask, options, axis, with_gradient=True)


def _loss_backward(options, axis, gradients, cotangents):
    d_hidden, d_head = ((cotangents[0] * d).astype(d.dtype) for d in gradients)
    return d_hidden, d_head, None, None, None


_loss = jax.custom_vjp(_loss_value, nondiff_argnums=(5, 6))
_loss.defvjp(_loss_forward, _loss_backward)


def _scan_loss(hidden, head, targets, labels, mask, options: LossOptions, axis: Axis, with_gradient: bool):
    """((loss sum, reading sums, count), (d_hidden, d_head)); the gradients are None unless asked for."""
    dtype = _accumulator(hidden)
    kernel, weights = head.astype(hidden.dtype), mask.astype(dtype)
    rows, teacher_kernel = _unpack(targets)

    def accumulate(carry, arrays) -> tuple[Any, Any]:
        (sums, d_head), w = carry, arrays[-1]
        counted = jax.tree.map(lambda a: _where_counted(w, a), arrays[:-1])
        readings, d_logits = _chunk_losses(counted, kernel, teacher_kernel, options, axis)
        sums = {name: sums[name] + jnp.sum(w * readings[name]) for name in sums}
        if not with_gradient:
            return (sums, None), None
        x = counted[0]
        d_logits = (w[..., None] * d_logits).astype(x.dtype)
        d_x = jnp.einsum("bcv,dv->bcd", d_logits, kernel, preferred_element_type=dtype)
        d_head += jnp.einsum("bcd,bcv->dv", x, d_logits, preferred_element_type=dtype)
        return (sums, d_head), d_x.astype(x.dtype)

    with jax.named_scope("loss_head"):
        # zeros made from the data vary over the same shard_map axes as the data
        zero = jnp.zeros_like(weights, shape=())
        names = ("loss", "ce", "accuracy") + (("kl", "agreement") if targets is not None else ())
        start = (dict.fromkeys(names, zero), jnp.zeros_like(head, dtype=dtype) if with_gradient else None)
        (sums, d_head), d_hidden = jax.lax.scan(accumulate, start, _cut((hidden, rows, labels, weights), options.chunk))
    gradients = (_join(d_hidden, hidden.shape[1]), d_head.astype(head.dtype)) if with_gradient else None
    return (sums.pop("loss"), sums, jnp.sum(weights)), gradients


def _vary_alike(hidden, head, targets, labels, mask, vocab_axis: Axis):
    """Inside `shard_map`, let all arrays vary over the axes any of them varies over; the identity outside.

    Its transpose sums the gradient of a replicated head over the devices that share it, and that of the hidden states
    over the devices that share V. Labels and mask stay what all of these have in common, and so do the sums.
    """
    arrays = (hidden, head, targets, labels, mask)
    axes = {axis for x in jax.tree.leaves(arrays) for axis in jax.typeof(x).manual_axis_type.varying}
    cut = {vocab_axis} if isinstance(vocab_axis, str) else set(vocab_axis or ())

    def vary(x, axes):
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    wide = jax.tree.map(lambda x: vary(x, axes), arrays[:3])
    return *wide, *(vary(x, axes - cut) for x in arrays[3:])


def _where_counted(weights: Array, x: Array) -> Array:
    """`x` with zeros where the weight is zero: not even a NaN may leak out of a masked position."""
    return jnp.where((weights != 0).reshape(weights.shape + (1,) * (x.ndim - weights.ndim)), x, 0)


def _accumulator(hidden: Array) -> Any:
    return jnp.promote_types(hidden.dtype, jnp.float32)


def _unpack(targets: Targets | None) -> tuple[Array | None, Array | None]:
    """What of the teacher is cut along T, and the matrix that turns it into logits (None when it is logits)."""
    if isinstance(targets, Hidden):
        return targets.hidden, targets.head.astype(targets.hidden.dtype)
    return (targets.logits if isinstance(targets, Dense) else None), None


def _cut(arrays, chunk: int):
    """Arrays [B, T, ...] -> [n, B, c, ...], zero-padded; cutting T leaves a sharded batch axis as it is."""
    rows, tokens = arrays[0].shape[:2]
    count = -(-tokens // max(1, min(tokens, chunk // rows)))
    length = -(-tokens // count)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, count * length - tokens)] + [(0, 0)] * (x.ndim - 2))
        return rearrange(x, "b (n c) ... -> n b c ...", n=count)

    return jax.tree.map(cut, arrays)


def _join(x: Array, tokens: int) -> Array:
    return rearrange(x, "n b c ... -> b (n c) ...")[:, :tokens]
