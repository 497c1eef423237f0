"""One self-contained HTML page for a sweep: a table of its points, how figures depend on values, the curves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from ministral_jax.files import read_jsonl
from ministral_jax.report import sweep_seeds
from ministral_jax.report.collect import number, series
from ministral_jax.report.markup import Child, Html, el, figure, model_name, paragraph, row, section, table
from ministral_jax.report.page import document, write
from ministral_jax.report.style import accent
from ministral_jax.report.sweep_plots import STYLES, Curve, Series, figure_over_values, kl_of_points
from ministral_jax.report.units import MISSING, decimal, duration, listing, percent, plural
from ministral_jax.runs.naming import label, setting

Record = dict[str, Any]
"""`sweep.json`, see `sweep_run.describe`."""

TITLES = {
    "kl": "KL",
    "ce": "cross-entropy",
    "ece": "calibration error",
    "bits_per_byte": "bits per byte",
    "digit_accuracy": "images read right",
    "kl_to_source": "KL to the source",
    "reward_accuracy": "answers right",
    "reward": "reward",
    "win_rate": "win rate",
    "loop_rate": "loop rate",
    "judge_accuracy": "pairs judged right",
    "judge_ece_before": "judge\u2019s ECE, raw",
    "judge_ece": "judge\u2019s ECE",
    "bytes_per_token": "bytes per token",
    "tail_mass": "tail mass",
}
_UNITS = {"kl": "nats", "ce": "nats", "kl_to_source": "nats"}
_HIGHER_IS_BETTER = ("digit_accuracy", "reward_accuracy", "reward", "win_rate", "judge_accuracy")
_SHARES = ("digit_accuracy", "reward_accuracy", "win_rate", "loop_rate", "judge_accuracy")


@dataclass(frozen=True)
class Column:
    """A figure of a stage that points are compared by."""

    stage: str
    metric: str

    def of(self, point: Record) -> float | None:
        return number(point["figures"].get(self.stage, {}).get(self.metric))

    def is_best(self, record: Record, point: Record) -> bool:
        """Never when all points are equal."""
        values = {value for other in record["points"] if (value := self.of(other)) is not None}
        pick = max if self.metric in _HIGHER_IS_BETTER else min
        return len(values) > 1 and self.of(point) == pick(values)

    def show(self, point: Record) -> str:
        value = self.of(point)
        return percent(value) if self.metric in _SHARES else decimal(value, None if value is None else 4)


def figure_columns(record: Record) -> list[Column]:
    """The figures that any point has, stage by stage."""
    return [
        Column(m["stage"], metric)
        for m in record["measure"]
        for metric in dict.fromkeys(name for point in record["points"] for name in point["figures"].get(m["stage"], {}))
    ]


def chief_columns(record: Record, columns: list[Column]) -> list[Column]:
    """Where room is scarce: of several stages, the first figure of each."""
    if len(record["measure"]) == 1:
        return columns
    return [next(c for c in columns if c.stage == stage) for stage in dict.fromkeys(c.stage for c in columns)]


def build_sweep_report(sweep_dir: Path) -> Path:
    """Write `<sweep_dir>/report.html` from its `sweep.json` and the metrics of its points."""
    record = json.loads((sweep_dir / "sweep.json").read_text(encoding="utf-8"))
    page = sweep_dir / "report.html"
    write(page, render(record, sweep_dir))
    return page


def render(record: Record, sweep_dir: Path) -> str:
    layout, columns, repeated = Layout(record), figure_columns(record), sweep_seeds.replicates(record, sweep_dir)
    sections = [
        ("seeds", "Seeds", sweep_seeds.seeds(repeated)),
        ("points", "Points", _points(record, columns)),
        ("values", "Values", None if repeated else _values(record, layout, columns)),
        ("curves", "Curves", _curves(record, layout, sweep_dir)),
        ("settings", "Settings", _settings(record)),
    ]
    made = [(anchor, name, content) for anchor, name, content in sections if content]
    footer = el("p", "One file; it loads nothing and runs no script.")
    title = sweep_seeds.headline(repeated) if repeated else _headline(record, columns)
    return document(f"sweep {record['name']}", title, _status(record), None, made, footer)


class Layout:
    """Which key is the horizontal axis, and which colour and line a point has.

    The first axis of the sweep with numbers is the horizontal one, else the one with the most values. Colour tells the
    values of all other axes apart, the line's style the place along the horizontal one.
    """

    def __init__(self, record: Record):
        points = record["points"]

        def numeric(key: str) -> bool:
            values = [p["settings"][key] for p in points]
            return all(number(v) is not None for v in values) and len(set(values)) > 1

        def places(keys: list[str]) -> list[str]:
            return list(dict.fromkeys(_words(record, p, keys) for p in points))

        axes = record["axes"]
        found = next(((axis, key) for axis in axes for key in axis if numeric(key)), None)
        self.key = found[1] if found else None
        axis = found[0] if found else max(axes, key=lambda keys: len(places(keys)))
        others = [key for keys in axes if keys != axis for key in keys]
        self.axis, self.places, self.series = axis, places(axis), places(others)
        self.label = label(record["keys"][self.key]) if self.key else ", ".join(label(record["keys"][k]) for k in axis)
        self._others, self._record = others, record

    @property
    def categories(self) -> list[str]:
        return [] if self.key else [text.partition("=")[2] if len(self.axis) == 1 else text for text in self.places]

    def x(self, point: Record) -> float:
        return float(point["settings"][self.key]) if self.key else float(self._place(point))

    def _place(self, point: Record) -> int:
        return self.places.index(_words(self._record, point, self.axis))

    def group(self, point: Record) -> int:
        return self.series.index(_words(self._record, point, self._others))

    def colour(self, point: Record) -> str:
        """By series; without any other axis, by place."""
        return accent(1 + (self.group(point) if self._others else self._place(point)))

    def style(self, point: Record) -> str:
        return STYLES[self._place(point) % len(STYLES)] if self._others else STYLES[0]


def _words(record: Record, point: Record, keys: list[str]) -> str:
    return ", ".join(f"{label(record['keys'][key])}={label(point['settings'][key])}" for key in keys)


def _headline(record: Record, columns: list[Column]) -> str:
    keys = listing(list(record["keys"].values()))
    winners = [point for point in record["points"] if columns and columns[0].is_best(record, point)]
    if not winners:
        return f"{plural(len(record['points']), 'point').capitalize()} over {keys}"
    winner = winners[0]
    values = listing([f"{short} = {setting(winner['settings'][key])}" for key, short in record["keys"].items()])
    way = "highest" if columns[0].metric in _HIGHER_IS_BETTER else "lowest"
    return f"{values} gives {columns[0].stage} the {way} {TITLES[columns[0].metric]}, {columns[0].show(winner)}"


def _status(record: Record) -> str:
    states = [point["state"] for point in record["points"]]
    text = f"{states.count('finished')} of {len(states)} points finished"
    if failed := states.count("failed"):
        text += f", {failed} failed"
    return (
        f"{text}, in {duration(record['seconds'])}. {record['stages']} stages make them; "
        f"run one by one the points would have made {record['stages_unshared']}."
    )


def _points(record: Record, columns: list[Column]) -> Html:
    heads: list[Child] = ["point", *record["keys"].values()]
    several = len(record["measure"]) > 1
    heads += [[el("span", TITLES[c.metric]), el("small", c.stage) if several else None] for c in columns]
    rows = [row(point["name"], _cells(record, point, columns)) for point in record["points"]]
    stages = listing([m["stage"] for m in record["measure"]])
    caption = f"Held-out figures of {stages} at its end, the best of each column in bold. KL is in nats per token."
    failed = [
        el("li", el("strong", point["name"]), f": {point['error']}")
        for point in record["points"]
        if point["state"] == "failed"
    ]
    more = [paragraph("These points failed:", "note"), el("ul", failed)] if failed else None
    finding = f"{plural(len(record['points']), 'point')} over {listing(list(record['keys'].values()))}"
    return section("points", "The points in numbers", finding.capitalize(), None, table(caption, heads, rows), more)


def _cells(record: Record, point: Record, columns: list[Column]) -> list[Child]:
    cells: list[Child] = [setting(point["settings"][key]) for key in record["keys"]]
    if point["state"] != "finished" and all(column.of(point) is None for column in columns):
        failed = point["state"] == "failed"
        state = el("td", point["state"], colspan=max(len(columns), 1), class_="wrong" if failed else None)
        return [*cells, state]
    return cells + [
        el("td", c.show(point), class_="best" if c.is_best(record, point) else None)
        if c.of(point) is not None
        else MISSING
        for c in columns
    ]


def _values(record: Record, layout: Layout, columns: list[Column]) -> Html | None:
    columns = chief_columns(record, columns)
    columns = [c for c in columns if any(c.is_best(record, point) for point in record["points"])]
    made = [
        figure(_title(c), picture, _caption(record, c)) for c in columns if (picture := _picture(record, layout, c))
    ]
    if not made:
        return None
    finding = f"What {listing(list(record['keys'].values()))} change{'' if len(record['keys']) > 1 else 's'}"
    return section("values", "Figures over values", finding, None, _key(layout), el("div", made, class_="grid"))


def _title(column: Column) -> str:
    return f"{TITLES[column.metric][0].upper()}{TITLES[column.metric][1:]} of {column.stage}"


def _caption(record: Record, column: Column) -> str:
    winner = next(point for point in record["points"] if column.is_best(record, point))
    way = "Highest" if column.metric in _HIGHER_IS_BETTER else "Lowest"
    return f"{way}: {column.show(winner)}, at {_words(record, winner, list(record['keys']))}."


def _key(layout: Layout) -> Html | None:
    """Names of the colours."""
    if len(layout.series) < 2:
        return None
    return el("ul", [el("li", model_name(name, accent(1 + i))) for i, name in enumerate(layout.series)], class_="key")


def _picture(record: Record, layout: Layout, column: Column) -> Html | None:
    groups = [Series(name, accent(1 + i), []) for i, name in enumerate(layout.series)]
    for point in record["points"]:
        if (value := column.of(point)) is not None:
            groups[layout.group(point)].points.append((layout.x(point), value))
    unit = _UNITS.get(column.metric)
    y_label = f"held-out {TITLES[column.metric]}" + (f", {unit}" if unit else "")
    alt = f"{_title(column)} against {layout.label}."
    return figure_over_values(groups, layout.label, y_label, alt, layout.categories)


def _curves(record: Record, layout: Layout, sweep_dir: Path) -> Html | None:
    made = [
        figure(f"Held-out KL of {m['stage']}", picture, _curve_caption(m["curve"]), "wide")
        for m in record["measure"]
        if m["curve"] and (picture := _curve_figure(record, layout, sweep_dir, m))
    ]
    lead = None
    return section("curves", "Curves", "Held-out KL over tokens, every point", lead, made) if made else None


def _curve_caption(stages: list[str]) -> str:
    text = f"Evaluations during {listing(stages)}"
    return f"{text}; the rule is where the next one begins." if len(stages) > 1 else f"{text}."


def _curve_figure(record: Record, layout: Layout, sweep_dir: Path, measure: Record) -> Html | None:
    curves, ends = [], []
    for point in record["points"]:
        parts = [list(_evaluations(sweep_dir / point["stages"][stage])) for stage in measure["curve"]]
        starts = [0.0, *accumulate(max((x for x, _ in part), default=0.0) for part in parts)]
        points = [(start + x, y) for start, part in zip(starts, parts, strict=False) for x, y in part]
        curves.append(Curve(point["name"], layout.colour(point), layout.style(point), points))
        ends = ends if len(ends) or not all(parts) else starts[1:-1]
    return kl_of_points(curves, ends, f"Held-out KL of {measure['stage']} against tokens for every point.")


def _evaluations(stage: Path) -> Iterator[tuple[float, float]]:
    rows = [r for r in read_jsonl(stage / "metrics.jsonl") if r.get("kind") == "eval"]
    return zip(*series(rows, "kl", positive=True), strict=True)


def _settings(record: Record) -> Html:
    rows = [
        row(el("code", key), [el("td", f"varies, {short}", class_="text")]) for key, short in record["keys"].items()
    ]
    rows += [row(el("code", k), [el("td", setting(v), class_="text wrap")]) for k, v in record["overrides"].items()]
    wanted = listing(record["wanted"]) if record["wanted"] else "all stages"
    lead = f"Recipe {record['recipe']}, {wanted}."
    return section(
        "settings", "Settings", "What varies and what is fixed", lead, table("Keys of the recipe.", ["key", ""], rows)
    )
