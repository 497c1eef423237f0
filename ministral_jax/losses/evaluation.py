"""Held-out evaluation: what a model says at every position, against the labels and a teacher; see `held_out`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Shaped

from ministral_jax.distributed.placement import Placement, Rules
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.held_out import HeldOut, document_sums, held_out_figures
from ministral_jax.losses.targets import Hidden
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import IMAGE_KEYS, VLM, Compute, Params, head_matrix, head_of, image_features

Batch = dict[str, Array]
TeacherFn = Callable[[Params, Batch], tuple[Float[Array, "B T D'"], Params]]
"""`(constants, batch)` to a teacher's final states and parameters of which it has at least the head."""
Predictions = list[Int[np.ndarray, "B T"]]
Evaluate = Callable[[Params, Params | None, Iterable[Batch]], tuple[HeldOut, Predictions]]
_READ_WITH = ("labels", "loss_mask", "answer_mask", "text_bytes", "positions", "document")
"""What the readings of a batch are read with."""


def model_inputs(batch: Batch) -> dict[str, Any]:
    """The keyword arguments of the model that a batch carries."""
    images = {key: batch[key] for key in (*IMAGE_KEYS, "features") if key in batch}
    return dict(positions=batch["positions"], segments=batch["segments"], images=images or None)


def hidden(model: VLM, params: Params, batch: Batch) -> Float[Array, "B T D"]:
    """After the final norm."""
    states: Any = model.apply({"params": params}, batch["tokens"], **model_inputs(batch), method="hidden")
    return states


def with_features(model: VLM, params: Params, batch: Batch) -> Batch:
    """A batch whose pictures the tower of `params` has seen, for all models that have the same one."""
    if "patches" not in batch:
        return batch
    others = {key: array for key, array in batch.items() if key not in IMAGE_KEYS}
    return others | image_features(model, params["vision"], batch)


def with_tower(constants: Params, params: Params) -> Params:
    """A teacher's parameters; those of the tower are the student's where it has none of its own."""
    return {**{part: tree for part, tree in params.items() if part == "vision"}, **constants}


def _compile(spec: ModelSpec, compute: Compute, placement: Placement) -> Callable[[Params, Batch], Array]:
    """`hidden` of one size."""
    return jax.jit(placement.rules.scoped(partial(hidden, VLM(spec, compute.evaluated))))


def _compile_reading(head: LossHead) -> Callable[..., dict[str, Shaped[Array, "B T"]]]:
    """What is read off a batch and what that is read with, whole on every device."""

    def read(states: Array, params: Params, targets: tuple[Array, Params] | None, batch: Batch) -> dict[str, Array]:
        teacher = None if targets is None else Hidden(targets[0], head_matrix(targets[1]))
        readings = head.evaluate_positions(states, head_matrix(params), teacher, batch["labels"])
        return readings | {key: batch[key] for key in _READ_WITH}

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
    teacher_context: int | None = None,
) -> Evaluate:
    """An evaluator of models of one size, against a teacher when what it says is given; at positions of its context.

    Returns:
        `(params, constants, batches) -> (what was found, predictions)` of batches of `data.pipeline.held_out` as
        `Placement.place` gives them; per batch the most probable next token in the row's order. `constants` are the
        teacher's.
    """

    def evaluate(params: Params, constants: Params | None, batches: Iterable[Batch]) -> tuple[HeldOut, Predictions]:
        sums: list[Any] = []
        predictions: Predictions = []
        for batch in batches:
            targets = None
            if teacher is not None and constants is not None:
                their_states, theirs = teacher(with_tower(constants, params), batch)
                targets = (their_states, head_of(theirs))
            states = forward(spec, compute, placement)(params, batch)
            read = reading(LossHead(placement, teacher_rules or placement.rules))
            found = jax.device_get(read(states, head_of(params), targets, batch))
            sums.append(document_sums(found, teacher_context))
            predictions.append(found["prediction"][:, np.argsort(placement.order(found["prediction"].shape[1]))])
        return held_out_figures(sums), predictions

    return evaluate
