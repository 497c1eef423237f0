"""How fast the devices of a mesh axis reach each other, and what a collective over it sends and takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from jax.sharding import Mesh

from ministral_jax.distributed.axes import Axes
from ministral_jax.planning.machine import Machine
from ministral_jax.planning.timing.assumptions import Assumptions

Op = Literal["gather", "scatter", "reduce", "exchange", "pass"]
"""All-gather, reduce-scatter, all-reduce, all-to-all, and a permutation around a ring."""


@dataclass(frozen=True)
class Transfer:
    """A collective over `axes` of an array that is `whole` bytes where it is whole on a device, run `times`.

    `waits`: the next operation needs its result.
    """

    op: Op
    axes: Axes
    whole: float
    times: float = 1
    waits: bool = False


@dataclass(frozen=True)
class Wire:
    """Between the devices of a group: bytes/s that each sends to all others and to the next one alone, hops across it,
    whether it leaves a slice or node, and the sides of the torus that it spans."""

    speed: float
    next: float
    hops: float
    network: bool
    sides: int


@dataclass(frozen=True)
class Links:
    """The links of a machine as a mesh lies on it."""

    mesh: Mesh
    machine: Machine
    assume: Assumptions

    @cached_property
    def _wires(self) -> dict[Axes, Wire]:
        return {}

    def parts(self, axes: Axes) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def sent(self, transfer: Transfer) -> float:
        """Bytes that a device sends, all times together, by ring algorithms: of S bytes over n devices (n-1)/n S, for a
        sum twice that. In a group that spans three sides of a torus XLA sums where it would gather or scatter."""
        n = self.parts(transfer.axes)
        if n == 1:
            return 0.0
        sums = transfer.op in ("gather", "scatter") and self.wire(transfer.axes).sides == 3
        doubled = transfer.op == "reduce" or sums
        return transfer.times * transfer.whole * (1 if transfer.op == "pass" else (n - 1) / n) * (2 if doubled else 1)

    def seconds(self, transfer: Transfer) -> float:
        """Of all times together, as if nothing else were done."""
        if self.parts(transfer.axes) == 1:
            return 0.0
        wire, assume = self.wire(transfer.axes), self.assume
        launch = assume.network_launch if wire.network else assume.launch + wire.hops * assume.hop
        speed = wire.next if transfer.op == "pass" else wire.speed
        return self.sent(transfer) / (speed * assume.link) + transfer.times * launch

    def wire(self, axes: Axes) -> Wire:
        """Of the groups that these axes form; all are alike, so that of the first device stands for them."""
        if axes not in self._wires:
            index: Any = tuple(slice(None) if name in axes else 0 for name in self.mesh.axis_names)
            self._wires[axes] = _wire(self.machine, list(self.mesh.devices[index].reshape(-1)))
        return self._wires[axes]


def _wire(machine: Machine, group: list[Any]) -> Wire:
    chip = machine.chip
    if chip.sides == 0:
        nodes = len({device.process_index for device in group})
        each = len(group) / nodes
        if nodes == 1:
            return Wire(chip.link, chip.link, 1, False, 0)
        return Wire(min(chip.link, each * chip.network), chip.network, 1, True, 0)
    slices = len({device.slice_index for device in group})
    if slices > 1:
        # Within a slice parts are summed first; each device then sends its part to its like in other slices.
        return Wire(chip.network * len(group) / slices, chip.network, 1, True, 0)
    speed, hops, sides = 0.0, 0.0, 0
    for side, length in enumerate(machine.shape):
        across = len({device.coords[side] for device in group})
        if across > 1:
            # Around a ring both directions carry a part; along a line what the end needs comes over one link.
            ring = across == length and wraps(machine, length)
            speed, hops, sides = speed + chip.link * (2 if ring else 1), hops + across / (2 if ring else 1), sides + 1
    return Wire(speed or chip.link, chip.link, hops, False, sides)  # without a side: the two cores of a chip


def wraps(machine: Machine, length: int) -> bool:
    """Whether a side of this many chips is a ring: in three dimensions where all sides make whole cubes of 4, in two
    where it has 16 (Google Cloud's pages of the TPU generations)."""
    return all(side % 4 == 0 for side in machine.shape) if machine.chip.sides == 3 else length == 16
