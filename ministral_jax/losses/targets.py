"""What the loss head is given: its options, and what it knows of the teacher, in four forms.

`Hidden` and `Dense` hold the teacher's whole distribution. `TopK` and `Sampled` hold what a logit store keeps of it;
the loss normalises them, so quantised values are a distribution again. Targets of positions that are not counted are
never used and may hold anything.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from jax import Array
from jaxtyping import Float, Int, Shaped
from pydantic import Field

from ministral_jax.errors import UserError
from ministral_jax.settings import Frozen

DEFAULT_CHUNK = 512
States = Float[Array, "B T D"]
Head = Float[Array, "D V"]
Labels = Int[Array, "B T"]
PerToken = Float[Array, "B T"]
Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
"""(sum, count) by name: of parts of a batch they add up."""


class LossOptions(Frozen):
    """What to minimise, per counted token:

    `(1 - ce_weight) * temperature² * divergence + ce_weight * cross_entropy`.

    With teacher p and student q at `temperature` (the square keeps the gradient's size, Hinton et al. 2015, §2), the
    divergence is `forward_kl`, KL(p‖q); `reverse_kl`, KL(q‖p) (MiniLLM, Gu et al. 2023); or `jsd`, the generalised
    Jensen-Shannon divergence β KL(p‖m) + (1 - β) KL(q‖m), m = β p + (1 - β) q, β = `jsd_beta` (GKD, Agarwal et al.
    2023, eq. 1). Cross-entropy is taken at temperature 1.

    `chunk` is how many tokens, over all local rows, have their logits in memory at once. `d_head` is read and written
    once per chunk, so it should not be below the device's FLOPs per byte of memory traffic (a few hundred).
    """

    objective: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    temperature: float = Field(default=1.0, gt=0)
    ce_weight: float = Field(default=0.0, ge=0, le=1)
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    chunk: int = Field(default=DEFAULT_CHUNK, ge=1)


class Hidden(NamedTuple):
    """Teacher targets as its final hidden states and its head."""

    hidden: Float[Array, "B T D'"]
    head: Float[Array, "D' V"]


class Dense(NamedTuple):
    """Teacher targets as logits: for tests and toy vocabularies."""

    logits: Float[Array, "B T V"]


class TopK(NamedTuple):
    """Teacher targets as W of its log-probabilities and the mass of all other ids, the tail.

    `ids` are distinct within a token; `tail` is the log of the tail's mass, -inf where there is none. If W = V there is
    no tail, whatever `tail` says.
    """

    ids: Int[Array, "B T W"]
    logprobs: Float[Array, "B T W"]
    tail: PerToken


class Sampled(NamedTuple):
    """Teacher targets as ids drawn from it: unbiased, where `TopK` leaves out what happens inside the tail.

    `counts` say how often each was drawn; a slot with count 0 is unused and its id means nothing. `entropy` is that of
    the whole teacher distribution in nats.
    """

    ids: Int[Array, "B T S"]
    counts: Shaped[Array, "B T S"]
    entropy: PerToken


Targets = Hidden | Dense | TopK | Sampled


def check_options(options: LossOptions, kind: str) -> None:
    """Raise `UserError` when targets of a codec's `kind` ("topk", "sampled", "hidden", "dense") cannot serve `options`.

    A teacher that is known in part has no tempered distribution, and no value at the ids that the student prefers.
    """
    if kind not in ("topk", "sampled"):
        return
    for name, accepted in (("objective", "forward_kl"), ("temperature", 1.0)):
        if (found := getattr(options, name)) != accepted:
            raise UserError(
                f"loss: {name} {found!r} does not go with teacher targets of codec {kind!r}, which accept only "
                f"{accepted!r} (codecs 'hidden' and 'dense' accept any)"
            )


def check_shapes(
    hidden: States, head: Head, targets: Targets | None, labels: Labels, mask: PerToken | None = None, shards: int = 1
) -> None:
    """Raise `UserError` when the arguments of a loss do not fit together; V of the heads is cut over `shards`."""
    positions = hidden.shape[:2]
    if hidden.ndim != 3 or head.ndim != 2 or hidden.shape[2] != head.shape[0]:
        raise UserError(f"loss head: hidden {hidden.shape} and head {head.shape} must be [B, T, D] and [D, V]")
    for name, x in (("labels", labels), ("mask", mask)):
        if x is not None and x.shape != positions:
            raise UserError(f"loss head: {name} of shape {x.shape} must be [B, T] = {positions}")
    match targets:
        case Hidden(rows, teacher_head):
            if rows.ndim != 3 or teacher_head.ndim != 2 or rows.shape[2] != teacher_head.shape[0]:
                found = f"teacher hidden {rows.shape} and head {teacher_head.shape}"
                raise UserError(f"loss head: {found} must be [B, T, D'] and [D', V]")
            vocab = teacher_head.shape[1]
        case Dense(rows):
            vocab = rows.shape[-1]
        case TopK() | Sampled():
            _check_sparse(targets, head.shape[1] * shards)
            rows, vocab = targets.ids, head.shape[1]
        case None:
            return
    if rows.shape[:2] != positions:
        raise UserError(f"loss head: teacher targets cover [B, T] = {rows.shape[:2]}, the student {positions}")
    if vocab != head.shape[1]:
        raise UserError(f"loss head: the teacher's vocabulary of {vocab} must equal the student's of {head.shape[1]}")


def _check_sparse(targets: TopK | Sampled, vocab: int) -> None:
    ids, values, per_token = targets
    (_, of_values, of_token), letter = targets._fields, "W" if isinstance(targets, TopK) else "S"
    if ids.ndim != 3 or values.shape != ids.shape or per_token.shape != ids.shape[:2]:
        raise UserError(
            f"loss head: teacher ids {ids.shape}, {of_values} {values.shape} and {of_token} {per_token.shape} must be "
            f"[B, T, {letter}], [B, T, {letter}] and [B, T]"
        )
    if ids.dtype != "int32":
        raise UserError(f"loss head: teacher ids of dtype {ids.dtype} must be int32")
    if isinstance(targets, TopK) and ids.shape[2] > vocab:
        raise UserError(f"loss head: {ids.shape[2]} distinct teacher ids must be at most the vocabulary of {vocab}")
