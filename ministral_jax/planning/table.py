"""A plan as a table on the terminal, with a bar for where the time of each stage goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ministral_jax.planning.findings.finding import counted
from ministral_jax.planning.plan import HOUR, Plan, StagePlan

if TYPE_CHECKING:
    from ministral_jax.planning.search import Choice

WIDTH, NARROW = 20, 10
"""Letters of a bar, and of one where the terminal has no room for all."""
SHOWN = 5
"""Ways to run a stage that are shown of those found."""
KINDS = {
    "matmul": ("green", "█"),
    "attention": ("blue", "▓"),
    "vision": ("magenta", "▒"),
    "head": ("cyan", "░"),
    "memory": ("yellow", "▚"),
    "loop": ("red", "╳"),
    "link": ("white", "─"),
}
"""Of where time goes: colour and letter, which a log without colours has alone."""
BAR = "where the time goes"
SAID = {"loop": "loops' floors", "link": "links, not hidden", "head": "loss head", "matmul": "matrix products"}


def plan_view(plan: Plan) -> RenderableType:
    """The table, what the bars mean, the sum, and what was found."""
    legend = Text("where the time goes: ")
    for kind, (colour, letter) in KINDS.items():
        legend.append(f"{letter} ", style=colour).append(f"{SAID.get(kind, kind)}  ")
    lines: list[RenderableType] = [stage_table(plan), legend, Text(_sum(plan))]
    for stage, preset in plan.presumed.items():
        lines.append(Text(f"sizes of {stage}: those of {preset}, its checkpoint is not here", style="dim"))
    for finding in plan.findings:
        colour = {"error": "bold red", "warning": "yellow"}[finding.level]
        lines.append(Text(f"{finding.level}: ", style=colour).append(str(finding), style="default"))
    lines.append(Text(f"{counted(plan.errors, 'error')}, {counted(len(plan.findings) - plan.errors, 'warning')}"))
    return Group(*lines)


def stage_table(plan: Plan) -> Table:
    """A row for each stage."""
    machine = plan.machine
    title = f"{plan.title}: {counted(machine.chips, 'chip')}, {counted(machine.hosts, 'host')}"
    cost = ["cost"] if plan.price is not None else []
    columns = ["stage", "mesh", "HBM\nGiB", "free", "step", "tok/s\nper chip", "MFU", "time", "chip-h", *cost, BAR]
    table = _table(title, columns)
    for stage in plan.stages:
        table.add_row(*_row(plan, stage))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    """Meshes and bars give way where there is little room; figures never do."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for column in columns:
        left = column in ("stage", "mesh", BAR)
        table.add_column(column, justify="left" if left else "right", no_wrap=column not in ("mesh", BAR))
    return table


def _row(plan: Plan, stage: StagePlan) -> list[RenderableType]:
    free, mfu, speed = plan.free(stage), plan.mfu(stage), plan.speed(stage)
    memory, time = stage.memory, stage.time
    row: list[RenderableType] = [stage.name, mesh_text(stage.mesh)]
    row.append("" if memory is None else f"{memory.peak.total / 2**30:.1f}")
    row.append("" if free is None else Text(f"{free:.0%}", style="red" if free < 0 else ""))
    row.append(duration(time.step_seconds) if time and time.step_seconds else "")
    row += ["" if speed is None else f"{speed:,.0f}", "" if mfu is None else f"{mfu:.1%}"]
    row += [duration(time.seconds), f"{plan.chip_hours(time.seconds):,.0f}"] if time else ["", ""]
    if plan.price is not None:
        row.append(f"{plan.cost(time.seconds):,.0f}" if time else "")
    return [*row, Bar(by_kind(stage))]


@dataclass(frozen=True)
class Bar:
    """Of seconds by kind, as wide as there is room."""

    seconds: Mapping[str, float]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(NARROW, WIDTH).clamp(None, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield bar(self.seconds, min(WIDTH, options.max_width))


def by_kind(stage: StagePlan) -> dict[str, float]:
    """Seconds of a whole stage."""
    found: dict[str, float] = defaultdict(float)
    for phase in stage.time.phases if stage.time else ():
        for part in phase.parts:
            found[part.kind] += part.seconds * phase.times
    return dict(found)


def bar(seconds: Mapping[str, float], width: int = WIDTH) -> Text:
    """Shares of a whole as letters; the largest remainders get what rounding leaves."""
    whole, text = sum(seconds.values()), Text()
    if not whole:
        return text
    exact = {kind: width * seconds.get(kind, 0) / whole for kind in KINDS}
    cells = {kind: int(share) for kind, share in exact.items()}
    for kind in sorted(exact, key=lambda kind: cells[kind] - exact[kind])[: width - sum(cells.values())]:
        cells[kind] += 1
    for kind, (colour, letter) in KINDS.items():
        text.append(letter * cells[kind], style=colour)
    return text


def _sum(plan: Plan) -> str:
    cost = "" if plan.price is None else f", {plan.cost(plan.seconds):,.0f} at {plan.price:g} a chip-hour"
    unknown = sum(stage.mesh is None for stage in plan.stages)
    if unknown == len(plan.stages):
        return "in all: not known, no mesh fits"
    without = f", without {counted(unknown, 'stage')} whose mesh does not fit" if unknown else ""
    return (
        f"in all {duration(plan.seconds)}, {plan.chip_hours(plan.seconds):,.0f} chip-hours{cost}; "
        f"{plan.disk / 1e12:,.2f} TB on disk at the most{without}"
    )


def choices_view(plan: Plan, stage: StagePlan, choices: Sequence[Choice]) -> RenderableType:
    """The first of what a search found beside what the recipe says, and the winner as words for the command line."""
    title = f"{stage.name}: {counted(len(choices), 'way')} to fit"
    table = _table(title, ["mesh", "micro-\nbatches", "remat", "HBM\nGiB", "free", "step", "MFU", BAR])
    for row in (stage, *(choice.plan for choice in choices[:SHOWN])):
        table.add_row(*_choice_row(plan, row), style="dim" if row is stage else "", end_section=row is stage)
    words = " ".join(choices[0].overrides) or "what the recipe says is the fastest"
    warned = [Text(f"that brings: {finding}", style="yellow") for finding in choices[0].warnings]
    return Group(table, Text(words, style="bold"), *warned)


def _choice_row(plan: Plan, stage: StagePlan) -> list[RenderableType]:
    settings: Any = stage.stage
    count = settings.batch.microbatches if hasattr(settings, "batch") else settings.microbatches
    _, mesh, memory, free, step, _, mfu, *_, where = _row(plan, stage)
    return [mesh, str(count), settings.compute.remat, memory, free, step, mfu, where]


def mesh_text(mesh: Mapping[str, int] | None) -> str:
    if mesh is None:
        return "does not fit"
    return " ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def duration(seconds: float) -> str:
    """`12 ms`, `3.4 s`, `5 min`, `7.2 h`, `3.1 d`."""
    for unit, size, below in (("ms", 1e-3, 1), ("s", 1, 120), ("min", 60, 2 * HOUR), ("h", HOUR, 48 * HOUR)):
        if seconds < below:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"
    return f"{seconds / HOUR / 24:.1f} d"
