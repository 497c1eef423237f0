"""The page of a plan: what stands in the way, and pictures of memory and time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from ministral_jax.distributed.torus import Side, torus_sides
from ministral_jax.planning.findings.memory import SPARE
from ministral_jax.planning.plan import Plan, StagePlan
from ministral_jax.planning.table import KINDS, SAID, by_kind, mesh_text
from ministral_jax.planning.timing.assumptions import Assumptions, meanings
from ministral_jax.report.page import render
from ministral_jax.report.units import THIN, count, decimal, duration, percent

_HELD = {
    "weights": "model-1", "moments": "model-0", "gradients": "model-3", "activations": "model-2", "cache": "model-4",
    "loss head": "model-5", "anything else": "faint",
}  # fmt: skip
"""What lies in memory, whoever's it is, and its colour."""
_KINDS = ("model-1", "model-2", "model-4", "model-5", "model-3", "faint", "model-0")
_TIMES = {kind: (SAID.get(kind, kind), colour) for kind, colour in zip(KINDS, _KINDS, strict=True)}
_BEYOND = 1.15
"""Of a device's memory: where bars end of what does not fit."""
_LITTLE = 0.001
_LEAST = 0.005
"""Share from which a part is told in words too."""


_NARROW = 6
"""Thousandths of a bar: narrower parts have no gap around them, which would hide them."""


class Segment(NamedTuple):
    name: str
    colour: str
    size: float
    said: str
    """Its size as people write it."""


@dataclass(frozen=True)
class Row:
    """A stage's bar and the words beside it. is_over: its bar goes beyond what there is."""

    stage: StagePlan
    picture: Markup
    told: str
    more: str
    parts: Sequence[Segment]
    is_over: bool = False

    @property
    def shown(self) -> list[Segment]:
        return _large(self.parts)


def plan_page(plan: Plan, command: str) -> str:
    """HTML that loads nothing; `command` is what made it."""
    memory = [_memory(plan, stage) for stage in plan.stages if stage.memory is not None]
    time = [_time(plan, stage) for stage in plan.stages if stage.seconds]
    held = {part.colour for row in memory for part in row.parts}
    spent = {part.colour for row in time for part in row.parts}
    sections = {
        "memory": memory,
        "held": [(name, colour) for name, colour in _HELD.items() if colour in held],
        "limit": 1 - SPARE,
        "time": time,
        "spent": [(said, colour) for said, colour in _TIMES.values() if colour in spent],
        "meshes": _meshes(plan),
        "assumptions": _assumptions(plan),
    }
    writers = {"mesh": mesh_text, "pace": _pace, "amount": _amount}
    return render("plan.html.j2", plan=plan, command=command, **writers, **sections)


def _memory(plan: Plan, stage: StagePlan) -> Row:
    """The fullest phase, against all that a device has."""
    assert stage.memory is not None
    peak, hbm = stage.memory.peak, plan.machine.chip.hbm
    parts = [Segment(i.name, _held(i.name), i.bytes, count(i.bytes, "B", "si")) for i in peak.items]
    alt = f"Memory of {stage.name} in phase {peak.phase}: {_words(parts)}."
    scale = hbm * (_BEYOND if any(s.memory and s.memory.peak.total > hbm for s in plan.stages) else 1)
    picture = bar(parts, scale, alt, {"all": hbm / scale, "safe": (1 - SPARE) * hbm / scale})
    free = 1 - peak.total / hbm
    more = f"{percent(free, 0)} free" if free >= 0 else f"{percent(1 - free, 0)} full"
    return Row(stage, picture, count(peak.total, "B", "si"), f"{peak.phase}: {more}", parts, free < 0)


def _held(name: str) -> str:
    return _HELD.get(name.rpartition(": ")[2], _HELD["anything else"])


def _time(plan: Plan, stage: StagePlan) -> Row:
    """Shares of the whole stage, evaluations included."""
    found = by_kind(stage)
    shares = {kind: found.get(kind, 0.0) / stage.seconds for kind in _TIMES}
    parts = [Segment(*_TIMES[kind], share, percent(share, 0)) for kind, share in shares.items() if share]
    share = stage.seconds / plan.seconds
    more = f"{percent(share) if share >= _LITTLE else f'less than {percent(_LITTLE)}'} of all"
    return Row(stage, bar(parts, 1, f"Time of {stage.name}: {_words(parts)}."), duration(stage.seconds), more, parts)


def _words(parts: Sequence[Segment]) -> str:
    return ", ".join(f"{part.name} {part.said}" for part in _large(parts)) or "nothing"


def _large(parts: Sequence[Segment]) -> list[Segment]:
    return [part for part in parts if part.size >= _LEAST * sum(each.size for each in parts)]


def bar(parts: Iterable[Segment], scale: float, alt: str, marks: Mapping[str, float] | None = None) -> Markup:
    """Sizes beside each other on an axis that ends at `scale`, and `marks` at shares of it, by their CSS class. It has
    no text and is as wide as its place, so that it is read on a telephone."""
    marks, at, made = marks or {}, 0.0, Markup()
    made += Markup('<rect class="track" width="{}" height="20" />').format(round(1000 * marks.get("all", 1), 2))
    for part in parts:
        width = min(1000 * part.size / scale, 1000 - at)
        if width > 0:
            look = f'style="fill:var(--{part.colour})"' + (' class="part"' if width > _NARROW else "")
            place = f'x="{at:.2f}" width="{width:.2f}" height="20" {look}'
            made += Markup("<rect {}><title>{} {}</title></rect>").format(Markup(place), part.name, part.said)
        at += max(width, 0.0)
    for kind, place in marks.items():
        made += Markup('<path class="{}" d="M{:.2f} -4v28" />').format(kind, 1000 * place)
    if at > 999.9 and marks:  # it goes on
        made += Markup('<path class="torn" d="M975 24l6 -28M983 24l6 -28" />')
    box = Markup('class="stack" role="img" viewBox="0 -4 1000 28" preserveAspectRatio="none"')
    return Markup('<svg {} aria-label="{}">{}</svg>').format(box, alt, made)


def _amount(value: float | None) -> str:
    return count(value) if value is None or value >= 10 else decimal(value)


def _pace(stage: StagePlan) -> str:
    """Seconds of a step."""
    seconds = stage.time.step_seconds if stage.time else 0.0
    return (duration(seconds) if seconds >= 10 else f"{decimal(seconds)}{THIN}s") if seconds else duration(None)


def _meshes(plan: Plan) -> list[tuple[str, list[tuple[str, str]], list[str]]]:
    """Every mesh: its sizes, on which sides of the torus its axes lie, and its stages."""
    found: dict[str, tuple[str, list[tuple[str, str]], list[str]]] = {}
    for stage in plan.stages:
        job = plan.context.jobs.get(stage.name)
        sides = torus_sides(job.mesh) if job else {}
        lies = [(axis, ", ".join(map(_side, on))) for axis, on in sides.items() if on]
        words = mesh_text(stage.mesh)
        found.setdefault(words, (words, lies, []))[2].append(stage.name)
    return list(found.values())


def _side(side: Side) -> str:
    return (
        f"{side.extent} of {side.whole} along {side.name}" if side.is_split else f"all {side.whole} along {side.name}"
    )


def _assumptions(plan: Plan) -> list[tuple[list[tuple[str, str, bool]], str]]:
    """Those that are explained together: name, value and whether it is another than usual; and the explanation."""
    usual: Any = Assumptions()

    def one(name: str) -> tuple[str, str, bool]:
        value = getattr(plan.assume, name)
        return name, str(value).lower() if isinstance(value, bool) else decimal(value), value != getattr(usual, name)

    return [([one(name) for name in names], said.replace("`", "")) for names, said in meanings().items()]
