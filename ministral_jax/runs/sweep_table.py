"""The figures of a sweep's points, side by side."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from ministral_jax.runs.naming import setting
from ministral_jax.runs.sweep import PointRecord, SweepRecord
from ministral_jax.stages import figures
from ministral_jax.stages.figures import Figure


@dataclass(frozen=True)
class Column:
    """A figure of a stage that points are compared by."""

    stage: str
    figure: Figure

    def of(self, point: PointRecord) -> float | None:
        return point.figures.get(self.stage, {}).get(self.figure.name)

    def is_best(self, record: SweepRecord, point: PointRecord) -> bool:
        """Never when all points are equal, or when neither way is better."""
        values = {value for other in record.points if (value := self.of(other)) is not None}
        best = {"higher": max, "lower": min, None: lambda values: None}[self.figure.better]
        return len(values) > 1 and self.of(point) == best(values)

    def show(self, point: PointRecord) -> str:
        value = self.of(point)
        return "" if value is None else format(value, ".1%" if self.figure.unit == "share" else ".4f")


def columns(record: SweepRecord) -> list[Column]:
    """The figures that any point has, stage by stage."""
    known = figures()
    return [
        Column(measure.stage, known[name])
        for measure in record.measure
        for name in dict.fromkeys(name for point in record.points for name in point.figures.get(measure.stage, {}))
        if name in known
    ]


def chief_columns(record: SweepRecord) -> list[Column]:
    """Where room is scarce: of several stages, the first figure of each."""
    found = columns(record)
    return found if len(record.measure) == 1 else list({c.stage: c for c in reversed(found)}.values())[::-1]


def sweep_table(record: SweepRecord) -> Table:
    """The varying keys and the figures of every point; the best of a column is bold."""
    done = sum(point.state == "finished" for point in record.points)
    table = Table(title=f"{record.name}: {done} of {len(record.points)} points, {record.seconds:,.0f} s")
    for short in record.keys.values():
        table.add_column(short)
    chief = chief_columns(record)
    for column in chief:
        name = column.figure.name
        table.add_column(f"{column.stage} {name}" if len(record.measure) > 1 else name, justify="right")
    if done < len(record.points):
        table.add_column("")
    for point in record.points:
        cells = [Text(column.show(point), style="bold" if column.is_best(record, point) else "") for column in chief]
        state = [] if done == len(record.points) else ["" if point.state == "finished" else point.state]
        table.add_row(*(Text(setting(point.settings[key])) for key in record.keys), *cells, *state)
    return table
