"""Where a student's targets come from: a model that runs beside it, or what a record stage has written of one.

A distil stage, its evaluation and its data only see `Teacher`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array
from pydantic import TypeAdapter

from ministral_jax.data.pipeline import Join
from ministral_jax.distributed.placement import Placement, Rules, partition
from ministral_jax.losses.evaluation import as_teacher, hidden
from ministral_jax.losses.targets import Hidden, Targets
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute, head_matrix
from ministral_jax.teachers.codecs import Codec, HiddenCodec, targets, unpack
from ministral_jax.teachers.store import Reader

Params = dict[str, Any]
Batch = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Teacher:
    """What a student is compared with.

    constants: arrays that every step is given, as `frozen["teacher"]`.
    targets: `(constants, batch) -> Targets`, traced within the step.
    held_out: `(constants, batch) -> (final states [B, T, D'], parameters with the head)`: the whole distribution.
    flops_per_token: what it adds to a step.
    join, held_out_join: what it adds to the rows of a batch when these are read.
    """

    constants: Params
    targets: Callable[[Params, Batch], Targets]
    held_out: Callable[[Params, Batch], tuple[Array, Params]]
    flops_per_token: float = 0.0
    join: Join | None = None
    held_out_join: Join | None = None


def online(spec: ModelSpec, params: Params, compute: Compute, placement: Placement, length: int) -> Teacher:
    """A model that runs on the student's mesh, by its own rules."""
    targets = online_targets(spec, compute, placement.rules)
    return Teacher(params, targets, as_teacher(spec, compute, placement), spec.flops_per_token(length))


def online_targets(spec: ModelSpec, compute: Compute, rules: Rules) -> Callable[[Params, Batch], Hidden]:
    """`(parameters, batch) -> Hidden`, to be traced within a step."""
    model, taught = VLM(spec, compute), rules.scoped(hidden)
    return lambda params, batch: Hidden(taught(model, params, batch), head_matrix(params))


def stored(reader: Reader, placement: Placement) -> Teacher:
    """A teacher that was recorded: only its output matrix is in memory, for what is stored as hidden states.

    Each host reads the targets of its own rows, in the threads that read these.
    """
    info = reader.info
    codec: Codec = TypeAdapter(Codec).validate_python(info.codec)
    forced, exact = info.forced, HiddenCodec.model_validate({"dtype": info.dtype})
    train, held_out = reader.split("train"), reader.split("held_out")
    return Teacher(
        {"decoder": {"head": _stored_head(reader, placement, info.dtype)}},
        lambda params, batch: targets(codec, batch, head_matrix(params), forced),
        lambda params, batch: (_as_hidden(exact, batch, params), params),
        join=lambda hashes: unpack(codec, train.read(hashes)),
        held_out_join=lambda hashes: unpack(exact, held_out.read(hashes)),
    )


def _as_hidden(codec: HiddenCodec, batch: Batch, params: Params) -> Array:
    found = targets(codec, batch, head_matrix(params), ())
    assert isinstance(found, Hidden)
    return found.hidden


def _stored_head(reader: Reader, placement: Placement, dtype: Any) -> Array:
    shape = (reader.info.width, reader.info.vocab)
    spec = partition(shape, ("embed", "vocab"), placement.rules, placement.mesh)
    sharding = jax.sharding.NamedSharding(placement.mesh, spec)

    def part(index: Any) -> Any:
        return reader.head(index).astype(dtype)

    return jax.make_array_from_callback(shape, sharding, part)
