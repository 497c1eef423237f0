"""The page of a sweep: its points, how figures depend on values, curves, and what changes whatever the seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ministral_jax.files import write_text
from ministral_jax.report.charts import Chart, axis, charts
from ministral_jax.report.page import render
from ministral_jax.report.plots import STEPS, TOKENS, Axis, Line, Note, accent, lines, share_tick
from ministral_jax.runs.comparable import OF_LENGTH, most_common
from ministral_jax.runs.naming import label, setting
from ministral_jax.runs.reading import Stage, points, read_stage
from ministral_jax.runs.seeds import Change
from ministral_jax.runs.sweep import Measured, PointRecord, SweepRecord
from ministral_jax.runs.sweep_run import read_record
from ministral_jax.runs.sweep_table import Column, chief_columns, columns
from ministral_jax.stages.figures import Figure

Stages = dict[str, Stage]
"""By directory, as points name them."""


def build_sweep_report(sweep_dir: Path) -> Path:
    """Write `<sweep_dir>/report.html` from its `sweep.json` and the metrics of its points.

    Raises:
        UserError: not a sweep's directory.
    """
    record = read_record(sweep_dir)
    places = {where: name for point in record.points for name, where in point.stages.items()}
    stages = {where: read_stage(sweep_dir / where, name) for where, name in places.items()}
    _leave_out_other_lengths(record, stages)
    layout = Layout(record)
    seeds = _seeds(record, stages) if all(key.endswith("seed") for key in record.keys) else {}
    made = {
        "columns": columns(record),
        "seeds": seeds,
        "values": charts(*(_values(record, layout, column) for column in chief_columns(record) if not seeds)),
        "series": layout.series,
        "heads": [f"{c.figure.label}{', ' + c.stage if len(record.measure) > 1 else ''}" for c in columns(record)],
        "curves": charts(*(_curves(record, stages, measure) for measure in record.measure)),
    }
    page = sweep_dir / "report.html"
    write_text(page, render("sweep.html.j2", record=record, setting=setting, accent=accent, **made))
    return page


def _leave_out_other_lengths(record: SweepRecord, stages: Stages) -> None:
    """Figures that depend on the length of the rows, of points whose rows are not as long as those of most."""
    for measure in record.measure:
        lengths = [stages[point.stages[measure.stage]].length for point in record.points]
        common = most_common(length for length in lengths if length)
        for point, length in zip(record.points, lengths, strict=True):
            for figure in OF_LENGTH if length not in (None, common) else ():
                point.figures.get(measure.stage, {}).pop(figure, None)


class Layout:
    """The first axis with numbers, else the first, is the horizontal one; colour tells the others apart."""

    def __init__(self, record: SweepRecord):
        numeric = [keys for keys in record.axes if isinstance(record.points[0].settings[keys[0]], (int, float))]
        self.across, self.keys = (numeric or record.axes)[0], record.keys
        self.others = tuple(key for keys in record.axes if keys != self.across for key in keys)
        self.style = "-" if numeric else ""
        self.places = list(dict.fromkeys(self.words(point, self.across) for point in record.points))
        self.series = list(dict.fromkeys(self.words(point, self.others) for point in record.points))

    def words(self, point: PointRecord, keys: Iterable[str]) -> str:
        return ", ".join(f"{label(self.keys[key])}={label(point.settings[key])}" for key in keys)

    def at(self, point: PointRecord) -> tuple[int, int]:
        """Places along the horizontal axis, and among the colours."""
        return self.places.index(self.words(point, self.across)), self.series.index(self.words(point, self.others))


def _values(record: SweepRecord, layout: Layout, column: Column) -> Chart | None:
    """A figure of every point against the values of the horizontal axis, a line for each of the others."""
    best = next((point for point in record.points if column.is_best(record, point)), None)
    if best is None:
        return None
    found = np.array(sorted((*layout.at(p)[::-1], y) for p in record.points if (y := column.of(p)) is not None))
    groups = [found[found[:, 0] == group] for group in range(len(layout.series))]
    hues = [accent(i, len(groups)) for i in range(1, len(groups) + 1)]
    made = [Line(g[:, 1], g[:, 2], hue, style=layout.style, mark="dot") for g, hue in zip(groups, hues, strict=True)]
    keys, what = ", ".join(layout.keys[key] for key in layout.across), f"{column.figure.label} of {column.stage}"
    names = [place.split("=", 1)[1] if len(layout.across) == 1 else place for place in layout.places]
    y_axis = axis(column.figure)
    if y_axis.share:  # as close as the points are
        y_axis = replace(y_axis, share=False, form=share_tick)
    picture = lines(made, Axis(keys, names=names), y_axis, f"{what} against {keys}.")
    return Chart(what, picture, f"Best: {column.show(best)}, at {layout.words(best, layout.keys)}.")


def _curves(record: SweepRecord, stages: Stages, measure: Measured) -> Chart | None:
    """The curve of a stage's verb, with what it goes on from, of every point on one axis."""
    told = next((stage for p in record.points if (stage := stages[p.stages[measure.stage]]).curve), None)
    if told is None or told.curve is None:
        return None
    made, notes = [], {}
    for point in record.points:
        begin, parts = 0.0, []
        for name in measure.curve or (measure.stage,):
            x, y = points(stages[point.stages[name]].evals, told.curve.figure, told.curve.over)
            notes |= {begin: Note(begin, None, "")} if begin else {}
            parts.append((x + begin, y))
            begin += max(x, default=0.0)
        x, y = (np.concatenate(values) for values in zip(*parts, strict=True))
        made.append(Line(x, y, accent(1 + len(made), len(record.points)), point.name))
    at, figure = STEPS if told.curve.over == "step" else TOKENS, told.figure(told.curve.figure)
    alt = f"{figure.label} of {told.name} against {at.label} for every point."
    picture = lines(made, at, axis(figure), alt, list(notes.values()), wide=True)
    return Chart(f"{figure.label} of {told.name}", picture, "Held out, every point; a rule is where a stage begins.")


def _seeds(record: SweepRecord, stages: Stages) -> dict[str, list[tuple[Change, Chart]]]:
    """Of every stage that each seed made anew."""
    made: dict[str, list[tuple[Change, Chart]]] = {}
    for name in dict.fromkeys(name for point in record.points for name in point.stages):
        seeds = [stages[w] for w in dict.fromkeys(p.stages[name] for p in record.points) if stages[w].manifest]
        for figure in seeds[0].figures if len(seeds) > 1 else ():
            ends = [(seed.first(figure.name), seed.last(figure.name)) for seed in seeds]
            pairs = [(before, after) for before, after in ends if before is not None and after is not None]
            if pairs and figure.better:
                made.setdefault(name, []).append((Change(figure, pairs), _over_seeds(name, seeds, figure, len(made))))
    return made


def _over_seeds(name: str, seeds: list[Stage], figure: Figure, index: int) -> Chart:
    curves, colour = [points(seed.evals, figure.name, "step") for seed in seeds], accent(index)
    common = sorted(set.intersection(*(set(x) for x, _ in curves)))
    mean = [float(np.mean([y[x == step] for x, y in curves])) for step in common]
    drawn = [*(Line(x, y, colour, width=0.9, alpha=0.6) for x, y in curves), Line(common, mean, colour, width=2.6)]
    picture = lines(drawn, STEPS, axis(figure), f"{figure.label} of {name} against steps, every seed.")
    return Chart(figure.label, picture, "Thin: each seed; thick: their mean.")
