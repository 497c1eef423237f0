"""Where a student's targets come from: a model that runs beside it, or what a record stage has written of one.

A distil stage, its evaluation and its data only see `Teacher`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax import Array
from pydantic import TypeAdapter

from ministral_jax.data.pipeline import Join
from ministral_jax.distributed.placement import Placement, Rules
from ministral_jax.losses.evaluation import TeacherFn, as_teacher, hidden
from ministral_jax.losses.targets import Hidden, Targets
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute, head_matrix
from ministral_jax.teachers.apart import STATES, Apart
from ministral_jax.teachers.codecs import Codec, exact, targets, unpack
from ministral_jax.teachers.store import Store

Params = dict[str, Any]
Batch = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Teacher:
    """What a student is compared with.

    context: positions from there on are beyond what it knows.
    constants: arrays that every step is given, as `frozen["teacher"]`.
    targets: `(constants, batch) -> Targets`, traced within the step.
    held_out: `(constants, batch) -> (final states [B, T, D'], parameters with the head)`: the whole distribution.
    flops_per_token: what it adds to a step.
    join, held_out_join: what it adds to the rows of a batch when these are read.
    """

    context: int
    constants: Params
    targets: Callable[[Params, Batch], Targets]
    held_out: TeacherFn
    flops_per_token: float = 0.0
    join: Join | None = None
    held_out_join: Join | None = None
    train_arrays: Batch = field(default_factory=dict)
    """What `join` adds to a global batch, as shapes; and"""
    held_out_arrays: Batch = field(default_factory=dict)
    """what `held_out_join` adds."""
    apart: Apart | None = None
    """Where it has a mesh of its own: what adds its states to a batch before the step."""


def online(spec: ModelSpec, params: Params, compute: Compute, placement: Placement, length: int) -> Teacher:
    """A model that runs on the student's mesh, by its own rules; its products are in the dtype of `compute`."""
    compute = compute.unrounded
    targets = online_targets(spec, compute, placement.rules)
    return Teacher(spec.context, params, targets, as_teacher(spec, compute, placement), spec.flops_per_token(length))


def online_targets(spec: ModelSpec, compute: Compute, rules: Rules) -> Callable[[Params, Batch], Hidden]:
    """`(parameters, batch) -> Hidden`, to be traced within a step."""
    model, taught = VLM(spec, compute), rules.scoped(hidden)
    return lambda params, batch: Hidden(taught(model, params, batch), head_matrix(params))


def from_states(spec: ModelSpec, head: Params, states: jax.ShapeDtypeStruct, apart: Apart | None = None) -> Teacher:
    """A model that is elsewhere, or gone: batches bring its final states. `states`: those of a global batch; `head`:
    its output matrix, see `vlm.head_of`; `apart`: where it runs on a mesh of its own."""
    taught = lambda constants, batch: Hidden(batch[STATES], head_matrix(constants))
    whole = lambda constants, batch: (batch[STATES], constants)
    flops, arrays = spec.flops_per_token(states.shape[1]), {STATES: states}
    return Teacher(spec.context, head, taught, whole, flops, train_arrays=arrays, held_out_arrays=arrays, apart=apart)


def stored(store: Store, placement: Placement, context: int) -> Teacher:
    """A teacher that was recorded, and its context: only its output matrix is in memory, for what is stored as hidden
    states.

    Each host reads the targets of its own rows, in the threads that read these.
    """
    info = store.info
    codec: Codec = TypeAdapter(Codec).validate_python(info.codec)

    def part(index: Any) -> np.ndarray:
        return store.head(index).astype(info.dtype)

    shape = (info.width, info.vocab)
    head = jax.make_array_from_callback(shape, placement.sharding(shape, ("embed", "vocab")), part)
    return replace(
        recorded(codec, info.forced, info.dtype, head, context),
        join=lambda hashes: unpack(store.read("train", hashes)),
        held_out_join=lambda hashes: unpack(store.read("held_out", hashes)),
    )


def recorded(codec: Codec, forced: tuple[int, ...], dtype: str, head: Any, context: int) -> Teacher:
    """What a store of `codec` for training rows teaches, its batches joined or not.

    Args:
        forced: ids that `codec` always keeps.
        dtype: of the hidden states of held-out rows.
        head: the teacher's output matrix `[D', V]`, an array or its shape.
        context: the teacher's.
    """

    def whole(params: Params, batch: Batch) -> tuple[Array, Params]:
        found = targets(exact(dtype), batch, head_matrix(params), ())
        assert isinstance(found, Hidden)
        return found.hidden, params

    taught = lambda params, batch: targets(codec, batch, head_matrix(params), forced)
    return Teacher(context, {"decoder": {"head": head}}, taught, whole)
