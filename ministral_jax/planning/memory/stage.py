"""Bytes on each device, on a host and on disk of everything that a stage holds, from what it computes.

Arithmetic alone: nothing is traced, compiled or allocated. See `temporaries` for what programs need while they run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from ministral_jax.planning.memory.draws import draw_moments
from ministral_jax.planning.memory.reads import cut_moments, read_moments, row_bytes, step_moments
from ministral_jax.planning.memory.shards import ITEMSIZE, Shards, parameters
from ministral_jax.planning.memory.temporaries import FLOAT, Moment, Rows, together
from ministral_jax.planning.records import Cut, Draw, Held, Move, Phase, Read, StageWork, Work

AHEAD = 10
"""Batches on a host: Grain makes up to 8 ahead (`data.pipeline`), one is being placed and one is read."""


@dataclass(frozen=True)
class Item:
    """Bytes on one device of one kind."""

    name: str
    bytes: int


@dataclass(frozen=True)
class PhaseMemory:
    """What lies on a device at the fullest moment of a phase."""

    phase: str
    items: tuple[Item, ...]

    @property
    def total(self) -> int:
        return sum(item.bytes for item in self.items)


@dataclass(frozen=True)
class StageMemory:
    """phases: bytes on one device. host: bytes that a host holds at once. written: bytes that the stage needs on disk:
    its result, the states it could go on from, and the one that is being written."""

    phases: tuple[PhaseMemory, ...]
    host: int
    written: int

    @property
    def peak(self) -> PhaseMemory:
        """The fullest phase; an empty one where nothing is known of the stage."""
        return max(self.phases, key=lambda phase: phase.total, default=PhaseMemory("", ()))


def stage_memory(work: StageWork, mesh: Mesh, hosts: int, apart: Mesh | None = None) -> StageMemory:
    """Of a stage on a mesh of devices on so many hosts; `apart`: its teacher's own one. Temporaries were held against
    libtpu's, see the tests."""
    work = work.on(mesh)
    held = together(*(_held(model, mesh) for model in work.held))
    theirs: tuple[PhaseMemory, ...] = ()
    if work.apart is not None and apart is not None:
        weights = together(*(_held(read.model, apart) for read in work.apart.work if isinstance(read, Read)))
        shares = apart.devices.flat[0] in mesh.devices
        held = together(held, weights) if shares else held
        theirs = (_phase(work.apart, held if shares else weights, apart),)
    phases = tuple(_phase(phase, held, mesh) for phase in work.phases)
    return StageMemory((*theirs, *phases), _host(work, mesh, hosts), _written(work))


# ---- devices ---------------------------------------------------------------------------------------------------------


def _held(model: Held, mesh: Mesh) -> Moment:
    """Parameters, and of those that learn AdamW's two moments."""
    shards = Shards(model.spec, model.rules, mesh)
    found = {f"{model.role}: weights": shards.size(*model.only) * ITEMSIZE[model.dtype]}
    if model.learns:
        found[f"{model.role}: moments"] = 2 * ITEMSIZE[model.moments] * shards.size(without=model.frozen)
    return found


def _phase(phase: Phase, held: Moment, mesh: Mesh) -> PhaseMemory:
    fullest = max(_moments(phase.work, mesh), key=lambda moment: sum(moment.values()), default={})
    if phase.held is not None:
        held = together(*(_held(model, mesh) for model in phase.held))
    found = together(held, {"states": sum(Rows(read, mesh).stream for read in phase.kept)}, fullest)
    return PhaseMemory(phase.name, tuple(Item(name, size) for name, size in found.items() if size))


def _moments(work: tuple[Work, ...], mesh: Mesh) -> Iterator[Moment]:
    reads = tuple(each for each in work if isinstance(each, Read))
    if any(read.learns for read in reads):
        # a reference's log-probabilities are read before the update, by a program of their own
        before = tuple(read for read in reads if not read.learns and read.head != "none")
        reads = tuple(read for read in reads if read not in before)
        yield from read_moments(before, mesh) if before else ()
        yield from step_moments(reads, mesh)
    elif reads:
        yield from read_moments(reads, mesh)
    for each in work:
        if isinstance(each, Draw):
            yield from draw_moments(each, mesh)
        elif isinstance(each, Cut):
            yield from cut_moments(each, mesh)
        elif isinstance(each, Move) and each.whole:
            yield _exported(each, mesh)


def _exported(move: Move, mesh: Mesh) -> Moment:
    """The parameters, and the largest tensor of a layer whole on every device, as they are fetched one by one."""
    return together(_held(move.model, mesh), {"gathered": _largest(move.model)})


def _largest(model: Held) -> int:
    sizes = (
        math.prod(shape[1:] if "/layers/" in path else shape) for path, (shape, _) in parameters(model.spec).items()
    )
    return max(sizes) * ITEMSIZE[model.dtype]


# ---- hosts and disk --------------------------------------------------------------------------------------------------


def _host(work: StageWork, mesh: Mesh, hosts: int) -> int:
    """Batches in flight, and what is being written or read: the host's share of a state or of a model, as a copy."""
    batches = [AHEAD * _host_batch(each, mesh) for phase in work.phases for each in phase.work]
    shares = [state_bytes(model) // hosts for model in work.held if model.learns]
    for phase in work.phases:
        for each in phase.work:
            if isinstance(each, Cut):
                shares.append(_parameters(each.target) * ITEMSIZE[each.target.dtype] // hosts)
            elif isinstance(each, Move):
                share = _parameters(each.model) * ITEMSIZE[each.model.dtype] // hosts
                # one tensor is fetched, in the file's layout, while another one is written
                shares.append(2 * _largest(each.model) if each.whole else share + _largest(each.model))
    return max(batches, default=0) + max(shares, default=0)


def _host_batch(work: Work, mesh: Mesh) -> int:
    """The rows of a global batch that a host's devices hold."""
    if not isinstance(work, Read):
        return 0
    v, patches = work.model.spec.vision, work.patches
    of_pictures = patches * v.patch_width if v is not None else 0  # bytes; bins are made of one batch at a time
    return math.ceil(work.rows * _share(work, mesh)) * (row_bytes(work) + of_pictures)


def _share(read: Read, mesh: Mesh) -> float:
    """The share of a batch's rows on one host: its devices along the axes that do not cut rows hold the same."""
    processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
    axes = tuple(n for n, axis in enumerate(mesh.axis_names) if axis not in read.model.rules.batch)
    return float((processes == processes.flat[0]).any(axis=axes).mean())


def state_bytes(model: Held) -> int:
    """Parameters that learn, in float32, with two moments: what a state to go on from holds."""
    return (FLOAT + 2 * ITEMSIZE[model.moments]) * _parameters(model, model.frozen)


def _parameters(model: Held, without: tuple[str, ...] = ()) -> int:
    found = parameters(model.spec)
    return sum(math.prod(shape) for path, (shape, _) in found.items() if path.split("/")[0] not in without)


def _written(work: StageWork) -> int:
    total = 0
    for model in work.held:
        if model.learns:  # a state counts once it is whole, and then the oldest goes
            total += _parameters(model) * FLOAT + (work.keep + 1) * state_bytes(model)
    for phase in work.phases:
        for each in phase.work:
            if isinstance(each, Cut):
                total += _parameters(each.target) * ITEMSIZE[each.target.dtype]
            elif isinstance(each, Move):
                total += _parameters(each.model) * ITEMSIZE[each.dtype or each.model.dtype]
            elif isinstance(each, Read) and phase.name == "record":
                total += round(phase.times) * each.rows * each.targets
    return total
