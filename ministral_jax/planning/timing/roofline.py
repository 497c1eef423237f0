"""How long a stage takes on a machine, phase by phase: arithmetic and memory against their peaks, loops by their trips,
and the time of collectives that nothing hides.

No device and no tracing: `work` says what is done, `blocks` and `costs` count it, `links` knows the network, and
`assumptions` has every constant. `docs/plan.md` tells how far off it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import Mesh

from ministral_jax.planning.machine import Machine
from ministral_jax.planning.records import Cut, Draw, Phase, Read, StageWork
from ministral_jax.planning.timing.assumptions import Assumptions
from ministral_jax.planning.timing.blocks import Cost, Kind, Layout
from ministral_jax.planning.timing.costs import costs
from ministral_jax.planning.timing.links import Links, Transfer


@dataclass(frozen=True)
class Part:
    """`seconds` of one pass of a phase; parts add up to the phase's. Of collectives only what nothing hides is one."""

    name: str
    kind: Kind
    seconds: float


@dataclass(frozen=True)
class PhaseTime:
    """One pass of a phase, `times` in the stage; `beside` as `Phase` has it.

    flops: of the model on all devices, without recomputation, as the training loop counts them for MFU.
    hbm: bytes that a device reads and writes.
    links: bytes that a device sends, by mesh axes, e.g. `fsdp` or `fsdp+context`.
    """

    phase: str
    times: float
    parts: tuple[Part, ...]
    flops: float
    hbm: float
    links: dict[str, float]
    beside: bool = False

    @property
    def seconds(self) -> float:
        """Of one pass."""
        return sum(part.seconds for part in self.parts)

    @property
    def total(self) -> float:
        """Seconds in the stage."""
        return self.seconds * self.times


@dataclass(frozen=True)
class StageTime:
    """All phases of a stage. tokens: that a step of its loop reads, in all rows; 0 where it has none."""

    phases: tuple[PhaseTime, ...]
    tokens: int

    @property
    def seconds(self) -> float:
        """Of the whole stage."""
        return sum(phase.total for phase in self.phases)

    @property
    def _step(self) -> PhaseTime | None:
        return next((phase for phase in self.phases if phase.phase == "step"), None)

    @property
    def step_seconds(self) -> float:
        """Of a step of the loop with all that comes with it (answers, judgements), evaluations aside; 0 without."""
        step = self._step
        return 0.0 if step is None else sum(p.total for p in self._often()) / step.times

    def mfu(self, peak: float) -> float:
        """FLOPs of the model per second of the loop's steps, as a share of `peak` FLOP/s of all devices; 0 without."""
        seconds = sum(p.total for p in self._often())
        return sum(p.flops * p.times for p in self._often()) / seconds / peak if seconds else 0.0

    def _often(self) -> list[PhaseTime]:
        return [p for p in self.phases if not p.beside] if self._step else []


def stage_time(
    work: StageWork,
    mesh: Mesh,
    machine: Machine,
    assume: Assumptions = Assumptions(),  # noqa: B008
    apart: Mesh | None = None,
) -> StageTime:
    """Predicted time of every phase of a stage that does `work` on `mesh` of `machine`; `apart`: its teacher's own
    mesh."""
    links, work = Links(mesh, machine, assume), work.on(mesh)
    step = work.phase("step")
    tokens = sum(w.rows * w.length for w in step.work if isinstance(w, Read) and w.learns) if step else 0
    phases = tuple(phase_time(phase, links) for phase in work.phases)
    if work.apart is not None and apart is not None:
        theirs = phase_time(work.apart, Links(apart, machine, assume))
        hides = apart.devices.flat[0] not in mesh.devices
        phases = (_beyond(theirs, phases[0].seconds) if hides else theirs, *phases)
    return StageTime(phases, tokens)


def _beyond(phase: PhaseTime, hidden: float) -> PhaseTime:
    """What is left of a phase when so many seconds of it pass while other devices work."""
    left = max(0.0, 1 - hidden / phase.seconds) if phase.seconds else 0.0
    return replace(phase, parts=tuple(replace(part, seconds=part.seconds * left) for part in phase.parts))


def phase_time(phase: Phase, links: Links) -> PhaseTime:
    """One pass of a phase."""
    found: list[Cost] = []
    for work in phase.work:
        model = work.source if isinstance(work, Cut) else work.model
        layout = Layout(links.mesh, model.rules)
        found += costs(work, layout, links.machine.hosts, links.assume)
    wide = any(getattr(getattr(w, "compute", None), "dtype", "") == "float32" for w in phase.work)
    busy = list(_busy(found, links, wide))
    sent = [transfer for cost in found for transfer in cost.sent]
    exposed = _exposed(sent, links, sum(part.seconds for part in busy))
    by_axes: dict[str, float] = defaultdict(float)
    for transfer in sent:
        by_axes["+".join(transfer.axes)] += links.sent(transfer)
    parts = tuple(part for part in _merged([*busy, *exposed]) if part.seconds)
    flops = sum(map(model_flops, phase.work))
    hbm = sum(cost.hbm for cost in found)
    sends = {axes: sent for axes, sent in by_axes.items() if sent}
    return PhaseTime(phase.name, phase.times, parts, flops, hbm, sends, phase.beside)


def model_flops(work: Any) -> float:
    """Of all devices, without recomputation, for the decoders alone: what the training loop makes MFU of."""
    if isinstance(work, Read):
        return (3 if work.learns else 1) * work.model.spec.flops_per_token(work.length) * work.rows * work.length
    if isinstance(work, Draw):
        length, answers = work.prompt + work.completion // 2, work.prompts * work.each
        read = work.model.spec.flops_per_token(work.prompt) * work.prompts * work.prompt
        # every token sees all before it, not half of them
        return read + work.model.spec.flops_per_token(2 * length) * answers * work.completion
    return 0.0


def _busy(found: Iterable[Cost], links: Links, wide: bool) -> Iterable[Part]:
    """Arithmetic or memory, whichever takes longer, and what loops and grids take beside them."""
    chip, assume = links.machine.chip, links.assume
    peak = chip.flops / (2 if wide and chip.name in TF32 else 1)
    trip = {"tpu": assume.trip, "gpu": assume.gpu_trip}.get(chip.platform, assume.cpu_trip)
    for cost in found:
        share = assume.attention if cost.name.endswith("attention") else assume.matmul
        memory = cost.hbm / (chip.hbm_bandwidth * assume.memory)
        yield Part(cost.name, cost.kind, max(cost.flops / (peak * share), memory) + cost.seconds)
        yield Part(f"loop of {cost.name}", "loop", cost.trips * trip + cost.idle)


TF32 = ("a100", "h100", "h200", "b200")
"""Where float32 products run at half the rate of bfloat16's; TPUs round them to bfloat16, JAX's default."""


def _exposed(sent: Iterable[Transfer], links: Links, busy: float) -> list[Part]:
    """Time of collectives beyond what hides behind `busy` seconds of arithmetic."""
    waits: dict[str, float] = defaultdict(float)
    hides: dict[str, float] = defaultdict(float)
    assume = links.assume
    for transfer in sent:
        seconds, share = links.seconds(transfer), assume.activations if transfer.waits else assume.overlap
        waits["+".join(transfer.axes)] += seconds * (1 - share)
        hides["+".join(transfer.axes)] += seconds * share
    hidden = min(1.0, busy / sum(hides.values())) if sum(hides.values()) else 1.0
    return [Part(axes, "link", waits[axes] + hides[axes] * (1 - hidden)) for axes in waits]


def _merged(parts: Iterable[Part]) -> list[Part]:
    """Parts of one name and kind as one: several models of a phase have layers."""
    found: dict[tuple[str, Kind], float] = defaultdict(float)
    for part in parts:
        found[part.name, part.kind] += part.seconds
    return [Part(name, kind, seconds) for (name, kind), seconds in found.items()]
