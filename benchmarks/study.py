"""The table of a study: every arm of a finished sweep over its seeds, and how it differs from the first one.

python benchmarks/study.py runs/pruning_defaults --metrics kl bits_per_byte --picture docs/pruning_defaults.svg

Keys that end in `seed` are seeds; points that agree in all others are an arm. A figure is its mean over seeds with the
interval in which that of all seeds lies, 19 times of 20 (Student's t). Differences are taken seed by seed, since arms
of one seed share rows, teacher and first weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.special import stdtrit

from ministral_jax.runs.sweep import SweepRecord

LIKELY = 0.95


@dataclass
class Arm:
    """What varies beside seeds, and its figures `name -> value of every seed`."""

    name: str
    figures: dict[str, list[float]] = field(default_factory=dict)


def read(sweep_dir: Path, stage: str | None = None, by: Sequence[str] = ()) -> list[Arm]:
    """The arms of a sweep, in order, by the figures of one of its measured stages (the last when none is named).

    Args:
        by: what an arm is called by, the ends of keys; all that vary but seeds when empty. The others have to vary with
            these.

    Raises:
        SystemExit: a point is not finished.
    """
    record = SweepRecord.model_validate(json.loads((sweep_dir / "sweep.json").read_text()))
    stage = stage or record.measure[-1].stage
    arms: dict[str, Arm] = {}

    def varied(settings: dict[str, Any], seeds: bool) -> dict[str, Any]:
        return {key: value for key, value in settings.items() if (key.rpartition(".")[2] == "seed") == seeds}

    def named(settings: dict[str, Any]) -> str:
        keys = [key for key in varied(settings, seeds=False) if not by or key.endswith(tuple(by))]
        return ", ".join(_said(record.keys[key], settings[key]) for key in keys) or "all"

    names = dict.fromkeys(named(point.settings) for point in record.points)
    for point in sorted(record.points, key=lambda point: [str(v) for v in varied(point.settings, seeds=True).values()]):
        if point.state != "finished":
            raise SystemExit(f"point {point.name} is {point.state}; run the sweep's command again")
        name = named(point.settings)
        for figure, value in point.figures[stage].items():
            arms.setdefault(name, Arm(name)).figures.setdefault(figure, []).append(value)
    return [arms[name] for name in names]


def read_stages(sweep_dir: Path, stages: Sequence[str | None], by: Sequence[str] = ()) -> list[Arm]:
    """`read` of each of these stages, which are then arms themselves."""
    if len(stages) == 1:
        return read(sweep_dir, stages[0], by)
    arms = [(stage, arm) for stage in stages for arm in read(sweep_dir, stage, by)]
    return [Arm(f"{stage}" if arm.name == "all" else f"{stage}, {arm.name}", arm.figures) for stage, arm in arms]


def _said(key: str, value: Any) -> str:
    return ", ".join(map(_said, value, value.values())) if isinstance(value, dict) else f"{key} {value}"


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its interval; NaN of one value."""
    count = len(values)
    half = stdtrit(count - 1, 0.5 + LIKELY / 2) * np.std(values, ddof=1) / count**0.5 if count > 1 else np.nan
    return float(np.mean(values)), float(half)


def table(arms: Sequence[Arm], metrics: Sequence[str]) -> str:
    """Markdown: of every arm each metric, and its difference from the first arm. Bold where the interval of the
    difference leaves out zero."""
    seeds = len(next(iter(arms[0].figures.values())))
    head = [f"arm ({seeds} seeds)", *(cell for metric in metrics for cell in (metric, "against the first"))]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in arms:
        cells = [arm.name]
        for metric in metrics:
            mean, half = mean_and_half(arm.figures[metric])
            pairs = zip(arm.figures[metric], arms[0].figures[metric], strict=True)
            change, around = mean_and_half([ours - first for ours, first in pairs])
            mark = "**" if abs(change) > around else ""
            cells += [f"{mean:.4f} ± {half:.4f}", "" if arm is arms[0] else f"{mark}{change:+.4f} ± {around:.4f}{mark}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(arms: Sequence[Arm], metrics: Sequence[str], path: Path) -> None:
    """A panel for each metric: every seed of an arm as a ring, its mean and interval as a dot on a line."""
    figure = Figure(figsize=(2.2 + 2.8 * len(metrics), 0.8 + 0.34 * len(arms)), layout="constrained")
    panels: Any = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    rows = range(len(arms))
    for axes, metric in zip(panels, metrics, strict=True):
        for row, arm in zip(rows, arms, strict=True):
            values = arm.figures[metric]
            mean, half = mean_and_half(values)
            axes.plot(values, [row] * len(values), "o", color="#2f5d8a", markersize=4, fillstyle="none", alpha=0.5)
            axes.errorbar(mean, row, xerr=half, fmt="o", color="#b3552e", markersize=4, linewidth=1.4)
        axes.axvline(np.mean(arms[0].figures[metric]), color="0.7", linewidth=0.8, zorder=0)
        axes.set_xlabel(metric)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(rows, [arm.name for arm in arms], fontsize=8)
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="directory of a finished sweep")
    parser.add_argument(
        "--stage", nargs="+", help="whose figures; the last measured one's unless said; several are arms"
    )
    parser.add_argument("--by", nargs="+", default=[], help="ends of the keys that arms are called by; all unless said")
    parser.add_argument("--metrics", nargs="+", default=["kl"])
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    found = read_stages(given.sweep, given.stage or [None], given.by)
    print(table(found, given.metrics))
    if given.picture is not None:
        picture(found, given.metrics, given.picture)
