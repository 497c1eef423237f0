"""Held-out figures: KL to the teacher, cross-entropy, bits per byte of text, exact match of answers about images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ministral_jax.distillation.kl import Hidden, evaluate_positions
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import IMAGE_KEYS, VLM, Compute, head_matrix

Params = dict[str, Any]
Batch = dict[str, Any]


def model_inputs(batch: Batch) -> dict[str, Any]:
    """The keyword arguments of the model that a batch carries."""
    images = {key: batch[key] for key in IMAGE_KEYS if key in batch}
    return dict(positions=batch["positions"], segments=batch["segments"], images=images or None)


def labels(batch: Batch) -> jax.Array:
    """`[B, T]` the next token of every position; the last column is never counted."""
    return jnp.roll(batch["tokens"], -1, axis=1)


def hidden(model: VLM, params: Params, batch: Batch) -> jax.Array:
    """`[B, T, D]` after the final norm."""
    return model.apply({"params": params}, batch["tokens"], **model_inputs(batch), method="hidden")  # type: ignore[return-value]


def _compile(spec: ModelSpec, compute: Compute) -> Callable[[Params, Batch], jax.Array]:
    """`hidden` of one size."""
    return jax.jit(partial(hidden, VLM(spec, compute)))


# Once for all stages of a process that evaluate the size. Any: a type checker takes frozen models for unhashable.
_forward: Any = cache(_compile)


@jax.jit
def _read(states: jax.Array, params: Params, targets: tuple[jax.Array, Params] | None, batch: Batch):
    teacher = None if targets is None else Hidden(targets[0], head_matrix(targets[1]))
    return evaluate_positions(states, head_matrix(params), teacher, labels(batch))


def make_evaluate(
    spec: ModelSpec, compute: Compute, teacher_spec: ModelSpec | None = None
) -> Callable[[Params, Params | None, Sequence[Batch]], tuple[dict[str, float], list[np.ndarray]]]:
    """An evaluator of models of one size, against a teacher when its size is given.

    Returns:
        `(params, teacher_params, batches) -> (figures, predictions)`: means over the counted positions of all batches,
        and per batch the most probable next token `[B, T]`.
    """

    def head(params: Params) -> Params:
        decoder = params["decoder"]
        return {"decoder": {key: decoder[key] for key in ("embed", "head") if key in decoder}}

    def evaluate(params: Params, teacher_params: Params | None, batches: Sequence[Batch]):
        outputs = []
        for batch in batches:
            targets = None
            if teacher_spec is not None and teacher_params is not None:
                targets = (_forward(teacher_spec, compute)(teacher_params, batch), head(teacher_params))
            outputs.append(jax.device_get(_read(_forward(spec, compute)(params, batch), head(params), targets, batch)))
        return figures(batches, outputs), [out["prediction"] for out in outputs]

    return evaluate


def figures(batches: Sequence[Batch], outputs: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """Means over held-out positions, in float64 on the host.

    `kl` and `ce` in nats per counted token; `bits_per_byte` over text; `digit_accuracy` over answers about images.
    """
    total = dict.fromkeys(("counted", "kl", "ce", "nats", "bytes", "right", "answers"), 0.0)
    for batch, out in zip(batches, outputs, strict=True):
        counted, text, answer = (np.asarray(batch[k], np.float64) for k in ("loss_mask", "text_bytes", "answer_mask"))
        total["counted"] += counted.sum()
        total["ce"] += (counted * out["ce"]).sum()
        total["kl"] += (counted * out["kl"]).sum() if "kl" in out else 0.0
        total["nats"] += ((text > 0) * np.asarray(out["ce"], np.float64)).sum()
        total["bytes"] += text.sum()
        total["right"] += (answer * (out["prediction"] == np.roll(batch["tokens"], -1, axis=1))).sum()
        total["answers"] += answer.sum()
    result = {"ce": total["ce"] / max(total["counted"], 1)}
    if outputs and "kl" in outputs[0]:
        result["kl"] = total["kl"] / max(total["counted"], 1)
    if total["bytes"]:
        result["bits_per_byte"] = total["nats"] / np.log(2) / total["bytes"]
    if total["answers"]:
        result["digit_accuracy"] = total["right"] / total["answers"]
    return {key: float(value) for key, value in result.items()}
