"""Held-out figures: KL to the teacher, cross-entropy, bits per byte of text, exact match of answers about images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from ministral_jax.distributed.placement import Placement, Rules
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.targets import Hidden, PerToken
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import IMAGE_KEYS, VLM, Compute, Params, head_matrix

Batch = dict[str, Array]
TeacherFn = Callable[[Params, Batch], tuple[Float[Array, "B T D'"], Params]]
"""`(constants, batch)` to a teacher's final states and parameters of which it has at least the head."""
Predictions = list[Int[np.ndarray, "B T"]]
Evaluate = Callable[[Params, Params | None, Iterable[Batch]], tuple[dict[str, float], Predictions]]
CALIBRATION_BINS = 15


def model_inputs(batch: Batch) -> dict[str, Any]:
    """The keyword arguments of the model that a batch carries."""
    images = {key: batch[key] for key in IMAGE_KEYS if key in batch}
    return dict(positions=batch["positions"], segments=batch["segments"], images=images or None)


def hidden(model: VLM, params: Params, batch: Batch) -> Float[Array, "B T D"]:
    """After the final norm."""
    states: Any = model.apply({"params": params}, batch["tokens"], **model_inputs(batch), method="hidden")
    return states


def _compile(spec: ModelSpec, compute: Compute, placement: Placement) -> Callable[[Params, Batch], Array]:
    """`hidden` of one size."""
    return jax.jit(placement.rules.scoped(partial(hidden, VLM(spec, compute))))


def _compile_reading(head: LossHead) -> Callable[..., tuple[dict[str, Array], Int[Array, "B T"]]]:
    """Sums over a batch and predictions, whole on every device."""

    def read(
        states: Array, params: Params, targets: tuple[Array, Params] | None, batch: Batch
    ) -> tuple[dict[str, Array], Array]:
        teacher = None if targets is None else Hidden(targets[0], head_matrix(targets[1]))
        readings = head.evaluate_positions(states, head_matrix(params), teacher, batch["labels"])
        return sums(batch, readings), readings["prediction"]

    return jax.jit(read, out_shardings=head.placement.replicated)


# Once for all stages of a process that evaluate the size. Any: a type checker takes frozen models for unhashable.
forward: Any = cache(_compile)
reading: Any = cache(_compile_reading)


def as_teacher(spec: ModelSpec, compute: Compute, placement: Placement) -> TeacherFn:
    """A model as a teacher: its parameters are the constants."""
    return lambda params, batch: (forward(spec, compute, placement)(params, batch), params)


def make_evaluate(
    spec: ModelSpec,
    compute: Compute,
    placement: Placement,
    teacher: TeacherFn | None = None,
    teacher_rules: Rules | None = None,
) -> Evaluate:
    """An evaluator of models of one size, against a teacher when what it says is given.

    Returns:
        `(params, constants, batches) -> (figures, predictions)`: means over the counted positions of all batches
        (as `Placement.place` gives them), and per batch the most probable next token in the row's order.
        `constants` are the teacher's.
    """

    def head(params: Params) -> Params:
        decoder = params["decoder"]
        return {"decoder": {key: decoder[key] for key in ("embed", "head") if key in decoder}}

    def evaluate(
        params: Params, constants: Params | None, batches: Iterable[Batch]
    ) -> tuple[dict[str, float], Predictions]:
        outputs: list[dict[str, np.ndarray]] = []
        predictions: Predictions = []
        for batch in batches:
            targets = None
            if teacher is not None and constants is not None:
                their_states, theirs = teacher(constants, batch)
                targets = (their_states, head(theirs))
            states = forward(spec, compute, placement)(params, batch)
            read = reading(LossHead(placement, teacher_rules or placement.rules))
            total, predicted = jax.device_get(read(states, head(params), targets, batch))
            outputs.append(total)
            predictions.append(predicted[:, np.argsort(placement.order(predicted.shape[1]))])
        return figures(outputs), predictions

    return evaluate


def sums(batch: Batch, readings: dict[str, Shaped[Array, "B T"]]) -> dict[str, Array]:
    """What `figures` needs of one batch: sums over its positions."""
    counted, answers = batch["loss_mask"], batch["answer_mask"]
    total = {
        "counted": counted.sum(),
        "ce": (counted * readings["ce"]).sum(),
        "nats": jnp.where(batch["text_bytes"] > 0, readings["ce"], 0).sum(),
        "bytes": batch["text_bytes"].sum(),
        "right": (answers * (readings["prediction"] == batch["labels"])).sum(),
        "answers": answers.sum(),
        "calibration": _calibration(counted, readings["confidence"], readings["prediction"] == batch["labels"]),
    }
    return total | ({"kl": (counted * readings["kl"]).sum()} if "kl" in readings else {})


def _calibration(counted: PerToken, confidence: PerToken, right: Bool[Array, "B T"]) -> Float[Array, "3 bins"]:
    """Of the positions whose prediction has a probability within each bin: how many, their probabilities, how many are
    right; sums."""
    bins = jnp.minimum((confidence * CALIBRATION_BINS).astype(jnp.int32), CALIBRATION_BINS - 1)
    in_bin = counted[..., None] * (bins[..., None] == jnp.arange(CALIBRATION_BINS))
    values = jnp.stack([jnp.ones_like(confidence), confidence, right.astype(confidence.dtype)])
    return jnp.einsum("vbt,btn->vn", values, in_bin, precision=jax.lax.Precision.HIGHEST)


def figures(outputs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over held-out positions, added up in float64 from the sums of the batches.

    `kl` and `ce` in nats per counted token; `bits_per_byte` over text; `digit_accuracy` over answers about images;
    `ece` the expected calibration error of the most probable token (Guo et al. 2017, eq. 3; 15 bins).
    """
    added: dict[str, Any] = {
        key: np.sum([out[key] for out in outputs], axis=0, dtype=np.float64) for key in (outputs or [{}])[0]
    }
    calibration = added.pop("calibration", None)
    total = {key: float(value) for key, value in added.items()}
    counted = max(total.get("counted", 0.0), 1.0)
    result = {key: total[key] / counted for key in ("ce", "kl") if key in total}
    if total.get("bytes"):
        result["bits_per_byte"] = total["nats"] / float(np.log(2)) / total["bytes"]
    if total.get("answers"):
        result["digit_accuracy"] = total["right"] / total["answers"]
    if calibration is not None:
        result["ece"] = float(np.abs(calibration[1] - calibration[2]).sum() / counted)
    return result
