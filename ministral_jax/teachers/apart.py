"""A teacher on a mesh of its own: on the student's devices, or on others. It hands its final hidden states over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from einops import rearrange
from jax import Array
from jaxtyping import Float
from pydantic import Field

from ministral_jax.distributed.handing import handed
from ministral_jax.distributed.placement import MeshConfig, Placement
from ministral_jax.losses.evaluation import hidden
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import IMAGE_KEYS, VLM, Compute

Params = dict[str, Any]
Batch = dict[str, Any]
STATES = "teacher_states"
"""Under which a batch has what the teacher handed over, [B, T, D']."""
TWIN = "teacher"
"""Under which a batch has the same rows on the teacher's mesh, until the teacher has read them."""


READ = ("tokens", "positions", "segments", *IMAGE_KEYS)
"""What it reads of a batch."""


class TeacherMesh(MeshConfig):
    """The mesh that a teacher runs on, in a program of its own: on all devices, or on `devices` that it has for itself.

    `devices`: so many, the last ones of every process; the student's mesh has the others. The teacher then reads the
    next batch while the student learns from this one. None: on the student's devices, in another shape. `slice`,
    `data`, `fsdp`, `tensor` and `context` are as in `mesh`.
    """

    devices: int | None = Field(default=None, ge=1)


@dataclass(frozen=True, eq=False)
class Apart:
    """The programs of a teacher apart, and where they run.

    read: `(parameters, batch) -> states [B, T, D']`, in the order in which the student's mesh has the tokens.
    params: the teacher's, on its mesh.
    own, student: where either has its rows.
    """

    read: Callable[[Params, Batch], Float[Array, "B T D'"]]
    params: Params
    own: Placement
    student: Placement

    def hand_over(self, batch: Batch) -> Batch:
        """A batch with the teacher's states in place of its rows on the teacher's mesh; nothing waits for these."""
        rows = dict(batch)
        with jax.set_mesh(self.own.mesh):
            states = self.read(self.params, rows.pop(TWIN))
        return rows | {STATES: handed(states, self.student.batch_sharding(STATES, states.ndim))}

    def taught(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Every batch with the teacher's states. On devices of its own the teacher is given the next one first, which
        it reads while the student learns."""
        ahead = self.own.mesh.devices.flat[0] not in self.student.mesh.devices
        waiting: list[Batch] = []
        try:
            for batch in batches:
                waiting.append(self.hand_over(batch))
                if len(waiting) > ahead:
                    yield waiting.pop(0)
            yield from waiting
        finally:
            getattr(batches, "close", lambda: None)()


def states_program(
    spec: ModelSpec, compute: Compute, own: Placement, student: Placement, microbatches: int
) -> Callable[[Params, Batch], Float[Array, "B T D'"]]:
    """`Apart.read`, compiled: as many rows at a time as there are in a microbatch."""
    model, read = VLM(spec, compute.unrounded), own.rules.scoped(hidden)

    def states(params: Params, batch: Batch) -> Float[Array, "B T D'"]:
        # as `make_step` splits it: each microbatch takes rows from every device
        split = jax.tree.map(lambda x: rearrange(x, "(b m) ... -> m b ...", m=microbatches), batch)
        found = rearrange(jax.lax.map(lambda rows: read(model, params, rows), split), "m b t d -> (b m) t d")
        length = found.shape[1]
        order = np.argsort(own.order(length))[student.order(length)]
        return found if np.array_equal(order, np.arange(length)) else found[:, order]

    return jax.jit(states)
