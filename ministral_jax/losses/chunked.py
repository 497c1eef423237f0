"""Distillation and cross-entropy losses on hidden states; no `[tokens, vocab]` array ever exists.

The head is applied to one chunk of the sequence at a time. When the loss is differentiated, the gradient of a chunk is
taken while its logits are still there (in the forward pass, as Liger Kernel does): what is kept for the backward pass
is `d_hidden [B, T, D]` and `d_head [D, V]`, which it only scales. So there are four matrix products per chunk, none of
them twice: student logits, teacher logits (not with sparse targets), `d_hidden`, `d_head`.

Sums, metrics and `d_head` are carried in float32 (float64 for float64 hidden states), whatever the inputs are; products
run in the dtype of the hidden states. Only the student's hidden states and head are differentiated, once.

Inside `jax.shard_map` (see `head.py`), with rows split over devices, sums and metrics are those of the device's own
rows, to be added with `psum`; a head that is replicated over these devices receives the sum of their gradients. Plain
`jit` over a sharded batch gives the same numbers, but reduces `d_head` over the devices once per chunk. `vocab_axis`
names the mesh axis over which V is cut, both heads' alike: the only collectives are then reductions of [B, c] numbers
over it, and the gradient of a head has the device's own columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Shaped

from ministral_jax.losses.divergences import (
    Axis,
    Categorical,
    Comparison,
    argmax,
    categorical,
    compare,
    logit_at,
    maximum,
    shard_count,
)
from ministral_jax.losses.sparse import compare_sampled, compare_topk
from ministral_jax.losses.targets import (
    DEFAULT_CHUNK,
    Dense,
    Head,
    Hidden,
    Labels,
    LossOptions,
    Metrics,
    PerToken,
    Sampled,
    States,
    Targets,
    TopK,
    check_options,
    check_shapes,
)

Arrays = TypeVar("Arrays")


class Inputs(NamedTuple):
    """What a loss is taken of; `targets` and `mask` where there are some."""

    hidden: States
    head: Head
    targets: Targets | None
    labels: Labels
    mask: PerToken | None


def distillation_loss(
    hidden: States,
    head: Head,
    targets: Targets,
    labels: Labels,
    mask: PerToken,
    options: LossOptions,
    vocab_axis: Axis = None,
) -> tuple[Array, Metrics]:
    """Sum of the distillation loss over counted tokens, and metrics as (sum, count).

    Args:
        hidden: student's final hidden states, any float dtype.
        head: student's output matrix (`embed.T` when tied); cast to the dtype of `hidden` for the products.
        targets: the teacher, constant.
        labels: in `[0, V)`; ignored where masked.
        mask: weights. A token of weight 0 adds exactly nothing to sums and gradients, even if its hidden
            states (the teacher's too) are NaN.
        vocab_axis: the `shard_map` axis that cuts V of both heads (and of dense targets); labels count the whole V.

    Returns:
        The scalar sum, to be divided by a metric's count for a mean, and the metrics `kl` (always KL(teacher‖student)
        at temperature 1, so that objectives compare), `ce`, and `agreement` (the teacher's top token is the student's,
        an exact tie included). Metrics carry no gradient.

        With `TopK` targets `kl` is the KL of W + 1 buckets, a lower bound that is never negative; `agreement` takes the
        teacher's most probable entry for its top; and `tail` is the teacher's mass outside the entries, which bounds
        the gradient's error (see `sparse`). With `Sampled` targets `kl` is an unbiased estimate, which
        may be negative, and there is no `agreement`.

    Raises:
        UserError: shapes do not fit together, or sparse targets meet another objective than `forward_kl` at
            temperature 1.
    """
    check_shapes(hidden, head, targets, labels, mask, shard_count(vocab_axis))
    check_options(options, type(targets).__name__.lower())
    inputs = vary_alike(Inputs(hidden, head, targets, labels, mask), vocab_axis)
    loss, sums, count = _loss(inputs, options, vocab_axis)
    return loss, {name: (sums[name], count) for name in ("ce", *_compared(targets))}


def cross_entropy(
    hidden: States, head: Head, labels: Labels, mask: PerToken, chunk: int = DEFAULT_CHUNK, vocab_axis: Axis = None
) -> tuple[Array, Metrics]:
    """Sum of the cross-entropy (nats) over counted tokens, and metrics `ce` and `accuracy` as (sum, count).

    `accuracy` counts the labels that are the student's top token, an exact tie included. Shapes, dtypes, masking and
    errors as in `distillation_loss`.
    """
    check_shapes(hidden, head, None, labels, mask)
    options = LossOptions(ce_weight=1, chunk=chunk)
    inputs = vary_alike(Inputs(hidden, head, None, labels, mask), vocab_axis)
    loss, sums, count = _loss(inputs, options, vocab_axis)
    return loss, {name: (sums[name], count) for name in ("ce", "accuracy")}


def evaluate_positions(
    hidden: States,
    head: Head,
    targets: Targets | None,
    labels: Labels,
    chunk: int = DEFAULT_CHUNK,
    vocab_axis: Axis = None,
) -> dict[str, Shaped[Array, "B T"]]:
    """Readings at every position. Nothing is masked. Shapes and errors as in `distillation_loss`.

    `ce` is -log q(label) and, when targets are given, `kl` is KL(teacher‖student), both in nats at temperature 1, of
    sparse targets what the loss says; `prediction` (int32) is the student's argmax, `confidence` the probability it
    gives to it, and `correct` is 1 where it is the label, else 0. All but `prediction` are float32 (float64 for float64
    hidden states).
    """
    check_shapes(hidden, head, targets, labels, shards=shard_count(vocab_axis))
    rows, teacher_kernel = _unpack(targets)
    kernel, options = head.astype(hidden.dtype), LossOptions(ce_weight=1, chunk=chunk)
    names = ("ce", "prediction", "confidence", *(() if targets is None else ("kl",)))

    def read(carry: None, chunk: Chunk) -> tuple[None, dict[str, Array]]:
        readings, _ = _chunk_losses(chunk, (kernel, teacher_kernel), options, vocab_axis)
        return carry, {name: readings[name] for name in names}

    with jax.named_scope("loss_head"):
        _, readings = jax.lax.scan(read, None, cut_tokens((hidden, rows, labels), chunk))
    readings = {name: join_tokens(x, labels.shape[1]) for name, x in readings.items()}
    return readings | {"correct": (readings["prediction"] == labels).astype(readings["ce"].dtype)}


# ---- one chunk ------------------------------------------------------------------------------------------------------


Chunk = tuple[Float[Array, "B c D"], Any, Int[Array, "B c"]]
"""Hidden states, what is known of the teacher (`_unpack`), and labels."""
Heads = tuple[Head, Float[Array, "D' V"] | None]
"""The student's and, where logits are made of its hidden states, the teacher's."""


def _chunk_losses(
    chunk: Chunk, heads: Heads, options: LossOptions, axis: Axis
) -> tuple[dict[str, Shaped[Array, "B c"]], Float[Array, "B c V"]]:
    """Readings by name, `loss` among them, and the gradient of `loss` in the student's logits.

    What a caller leaves unused (the gradient, a reading) is not computed under `jit` and inside `scan`.
    """
    (hidden, rows, labels), (kernel, teacher_kernel) = chunk, heads
    student = chunk_logits(hidden, kernel)
    first = 0 if axis is None else jax.lax.axis_index(axis) * student.shape[-1]
    q, best = categorical(student, axis), maximum(student, axis)
    at_label = logit_at(labels - first, student, axis)
    ce = q.lse - at_label
    readings = {
        "ce": ce,
        "accuracy": (at_label == best).astype(ce.dtype),
        "prediction": argmax(best, student, first, axis),
        "confidence": jnp.exp(best - q.lse),
    }
    losses: list[Array] = []
    gradients: list[Array] = []
    if options.ce_weight > 0:
        is_label = jnp.arange(student.shape[-1]) == (labels - first)[..., None]
        losses.append(options.ce_weight * ce)
        gradients.append(options.ce_weight * (q.probabilities - is_label))
    if rows is not None:
        compared, value, d_logits = _compare(rows, teacher_kernel, q, best, options)
        readings |= compared
        if options.ce_weight < 1:
            tau, weight = options.temperature, 1 - options.ce_weight
            losses.append(weight * tau**2 * value)
            gradients.append(weight * tau * d_logits)
    loss: Any = sum(losses)  # Any: of no terms it would be the integer 0
    gradient: Any = sum(gradients)
    return readings | {"loss": loss}, gradient


def _compare(
    rows: Any, teacher_kernel: Array | None, q: Categorical, best: Float[Array, "B c"], options: LossOptions
) -> Comparison:
    if isinstance(rows, TopK):
        return compare_topk(rows, q, best)
    if isinstance(rows, Sampled):
        return compare_sampled(rows, q)
    teacher = rows if teacher_kernel is None else chunk_logits(rows, teacher_kernel)
    return compare(teacher.astype(q.logits.dtype), q, best, options)


def chunk_logits(hidden: Float[Array, "B c D"], kernel: Head) -> Float[Array, "B c V"]:
    """In the accumulator's dtype."""
    return jnp.einsum("bcd,dv->bcv", hidden, kernel, preferred_element_type=accumulator(hidden))


# ---- sums over all chunks, with the gradient taken on the way -------------------------------------------------------


Sums = tuple[Float[Array, ""], dict[str, Float[Array, ""]], Float[Array, ""]]
"""Of the loss, of the readings by name, and of the weights."""
Gradients = tuple[States, Head]


def _loss_value(inputs: Inputs, options: LossOptions, axis: Axis) -> Sums:
    return _scan_loss(inputs, options, axis, with_gradient=False)[0]


def _loss_forward(inputs: Inputs, options: LossOptions, axis: Axis) -> tuple[Sums, Gradients | None]:
    return _scan_loss(inputs, options, axis, with_gradient=True)


def _loss_backward(options: LossOptions, axis: Axis, gradients: Gradients, cotangents: Sums) -> tuple[Any]:
    d_hidden, d_head = ((cotangents[0] * d).astype(d.dtype) for d in gradients)
    return (Inputs(d_hidden, d_head, None, None, None),)  # pyright: ignore[reportArgumentType]  # None: no gradient


_loss = jax.custom_vjp(_loss_value, nondiff_argnums=(1, 2))
_loss.defvjp(_loss_forward, _loss_backward)


def _scan_loss(inputs: Inputs, options: LossOptions, axis: Axis, with_gradient: bool) -> tuple[Sums, Gradients | None]:
    """The sums, and the gradients when they are asked for."""
    hidden, head, targets, labels, mask = inputs
    assert mask is not None
    dtype = accumulator(hidden)
    kernel, weights = head.astype(hidden.dtype), mask.astype(dtype)
    rows, teacher_kernel = _unpack(targets)

    def accumulate(carry: tuple[dict[str, Array], Any], arrays: tuple[*Chunk, Array]) -> tuple[Any, Any]:
        (sums, d_head), w = carry, arrays[-1]
        counted = jax.tree.map(lambda a: where_counted(w, a), arrays[:-1])
        readings, d_logits = _chunk_losses(counted, (kernel, teacher_kernel), options, axis)
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
        names = ("loss", "ce", "accuracy", *_compared(targets))
        start = (dict.fromkeys(names, zero), jnp.zeros_like(head, dtype=dtype) if with_gradient else None)
        (sums, d_head), d_hidden = jax.lax.scan(
            accumulate, start, cut_tokens((hidden, rows, labels, weights), options.chunk)
        )
    gradients = (join_tokens(d_hidden, hidden.shape[1]), d_head.astype(head.dtype)) if with_gradient else None
    return (sums.pop("loss"), sums, jnp.sum(weights)), gradients


def vary_alike(inputs: Inputs, vocab_axis: Axis) -> Inputs:
    """Inside `shard_map`, let all arrays vary over the axes any of them varies over; the identity outside.

    Its transpose sums the gradient of a replicated head over the devices that share it, and that of the hidden states
    over the devices that share V. Labels, mask and sparse targets stay what all of these have in common, and so do the
    sums.
    """
    axes = {axis for x in jax.tree.leaves(inputs) for axis in jax.typeof(x).manual_axis_type.varying}
    cut = {vocab_axis} if isinstance(vocab_axis, str) else set(vocab_axis or ())

    def vary(tree: Arrays, axes: set[str]) -> Arrays:
        def one(x: Array) -> Array:
            missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
            return jax.lax.pcast(x, missing, to="varying") if missing else x

        return jax.tree.map(one, tree)

    hidden, head, targets, labels, mask = inputs
    of_teacher = axes - cut if isinstance(targets, TopK | Sampled) else axes
    labels, mask = vary((labels, mask), axes - cut)
    return Inputs(vary(hidden, axes), vary(head, axes), vary(targets, of_teacher), labels, mask)


def where_counted(weights: Float[Array, "B c"], x: Shaped[Array, "B c ..."]) -> Shaped[Array, "B c ..."]:
    """`x` with zeros where the weight is zero: not even a NaN may leak out of a masked position."""
    return jnp.where((weights != 0).reshape(weights.shape + (1,) * (x.ndim - weights.ndim)), x, 0)


def accumulator(hidden: Array) -> DTypeLike:
    """The dtype that sums over V and over tokens are carried in."""
    return jnp.promote_types(hidden.dtype, jnp.float32)


def _unpack(targets: Targets | None) -> tuple[Any, Array | None]:
    """What of the teacher is cut along T, and the matrix that turns it into logits (None when that is not needed)."""
    if isinstance(targets, Hidden):
        return targets.hidden, targets.head.astype(targets.hidden.dtype)
    return targets.logits if isinstance(targets, Dense) else targets, None


def _compared(targets: Targets | None) -> tuple[str, ...]:
    """Names of the readings that tell student from teacher."""
    match targets:
        case Hidden() | Dense():
            return ("kl", "agreement")
        case TopK():
            return ("kl", "agreement", "tail")
        case Sampled():
            return ("kl",)
        case None:
            return ()


def cut_tokens(arrays: Arrays, chunk: int) -> Arrays:
    """A tree of arrays [B, T, ...] -> [n, B, c, ...], zero-padded; cutting T leaves a sharded batch axis as it is."""
    rows, tokens = jax.tree.leaves(arrays)[0].shape[:2]
    count = -(-tokens // max(1, min(tokens, chunk // rows)))
    length = -(-tokens // count)

    def cut(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "n B c ..."]:
        x = jnp.pad(x, [(0, 0), (0, count * length - tokens)] + [(0, 0)] * (x.ndim - 2))
        return rearrange(x, "b (n c) ... -> n b c ...", n=count)

    return jax.tree.map(cut, arrays)


def join_tokens(x: Shaped[Array, "n B c ..."], tokens: int) -> Shaped[Array, "B T ..."]:
    """The inverse of `cut_tokens`, for one array."""
    return rearrange(x, "n b c ... -> b (n c) ...")[:, :tokens]
