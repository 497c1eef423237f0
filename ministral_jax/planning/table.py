"""A plan as a table on the terminal, with a bar for where the time of each stage goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ministral_jax.planning.plan import HOUR, Plan, StagePlan
from ministral_jax.planning.search import Choice

WIDTH = 20
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
    lines.append(Text(f"{plan.errors} errors, {len(plan.findings) - plan.errors} warnings"))
    return Group(*lines)


def stage_table(plan: Plan) -> Table:
    """A row for each stage."""
    machine = plan.machine
    title = f"{plan.title}: {machine.chips} chips, {machine.hosts} hosts"
    table = Table(title=title, title_justify="left", expand=False)
    columns = ["stage", "do", "mesh", "HBM", "free", "step", "tok/s/chip", "MFU", "time", "chip-h"]
    for column in [*columns, *(["cost"] if plan.price is not None else []), "where the time goes"]:
        table.add_column(column, justify="left" if column in ("stage", "do", "mesh") else "right", no_wrap=True)
    for stage in plan.stages:
        table.add_row(*_row(plan, stage))
    return table


def _row(plan: Plan, stage: StagePlan) -> list[RenderableType]:
    free, mfu, speed = plan.free(stage), plan.mfu(stage), plan.speed(stage)
    memory, time = stage.memory, stage.time
    row: list[RenderableType] = [stage.name, stage.stage.do, mesh_text(stage.mesh)]
    row.append("" if memory is None else f"{memory.peak.total / 2**30:.1f} GiB")
    row.append("" if free is None else Text(f"{free:.0%}", style="red" if free < 0 else ""))
    row += [duration(time.step_seconds) if time and time.step_seconds else ""]
    row += ["" if speed is None else f"{speed:,.0f}", "" if mfu is None else f"{mfu:.1%}"]
    row += [duration(stage.seconds), f"{plan.chip_hours(stage.seconds):,.0f}"]
    if plan.price is not None:
        row.append(f"{plan.cost(stage.seconds) or 0:,.0f}")
    return [*row, bar(by_kind(stage))]


def by_kind(stage: StagePlan) -> dict[str, float]:
    """Seconds of a whole stage."""
    found: dict[str, float] = defaultdict(float)
    for phase in stage.time.phases if stage.time else ():
        for part in phase.parts:
            found[part.kind] += part.seconds * phase.times
    return dict(found)


def bar(seconds: Mapping[str, float]) -> Text:
    """Shares of a whole as letters; the largest remainders get what rounding leaves."""
    whole, text = sum(seconds.values()), Text()
    if not whole:
        return text
    exact = {kind: WIDTH * seconds.get(kind, 0) / whole for kind in KINDS}
    cells = {kind: int(share) for kind, share in exact.items()}
    for kind in sorted(exact, key=lambda kind: cells[kind] - exact[kind])[: WIDTH - sum(cells.values())]:
        cells[kind] += 1
    for kind, (colour, letter) in KINDS.items():
        text.append(letter * cells[kind], style=colour)
    return text


def _sum(plan: Plan) -> str:
    cost = "" if plan.price is None else f", {plan.cost(plan.seconds):,.0f} at {plan.price:g} a chip-hour"
    return (
        f"in all {duration(plan.seconds)}, {plan.chip_hours(plan.seconds):,.0f} chip-hours{cost}; "
        f"{plan.written / 1e12:,.2f} TB on disk if nothing is cleaned"
    )


def choices_view(plan: Plan, stage: StagePlan, choices: Sequence[Choice]) -> RenderableType:
    """The first of what a search found beside what the recipe says, and the winner as words for the command line."""
    table = Table(title=f"{stage.name}: {len(choices)} ways fit", title_justify="left")
    for column in ("mesh", "microbatches", "remat", "HBM", "free", "step", "MFU", "where the time goes"):
        table.add_column(column, justify="left" if column == "mesh" else "right", no_wrap=True)
    for row in (stage, *(choice.plan for choice in choices[:SHOWN])):
        table.add_row(*_choice_row(plan, row), style="dim" if row is stage else "", end_section=row is stage)
    words = " ".join(choices[0].overrides) or "what the recipe says is the fastest"
    return Group(table, Text(words, style="bold"))


def _choice_row(plan: Plan, stage: StagePlan) -> list[RenderableType]:
    settings: Any = stage.stage
    count = settings.batch.microbatches if hasattr(settings, "batch") else settings.microbatches
    _, _, mesh, memory, free, step, _, mfu, *_ = _row(plan, stage)
    return [mesh, str(count), settings.compute.remat, memory, free, step, mfu, bar(by_kind(stage))]


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
