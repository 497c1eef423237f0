"""The head start in docs/evidence.md, from a finished `ministral-jax sweep configs/studies/head_start.yaml`.

python benchmarks/head_start.py runs/head_start --picture docs/head_start.svg

How many tokens does a model from random weights need, and how many does a pruned one need for the same held-out KL?
Student and scratch runs are the distil stages of the sweep, `<child>-...`; those without a source are from scratch.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from study import mean_and_half

from ministral_jax.files import read_jsonl
from ministral_jax.runs.summary import tokens_read
from ministral_jax.runs.sweep_run import read_record
from ministral_jax.stages.manifest import finished

SCRATCH, STUDENT = "#b3552e", "#2f5d8a"


@dataclass(frozen=True)
class Curve:
    """Held-out KL of one distil stage.

    before: tokens charged before its first step: calibration and training on the way from the parent, its own cut last.
    own: of these, those of its own cut.
    tokens, kl: of every evaluation; tokens that the stage had trained on.
    """

    child: str
    stage: str
    scratch: bool
    before: int
    own: int
    tokens: Sequence[int]
    kl: Sequence[float]


@dataclass(frozen=True)
class Reached:
    """Tokens at which a KL was reached. `bound`: "first" when it was there at the first evaluation, so that the tokens
    are what the cut cost; "never" when not even at the end, which the tokens are then of; else empty."""

    charged: float
    own: float
    bound: str = ""


def read_curve(stage: str, run_dir: Path) -> Curve:
    """Of a finished distil stage, by the manifests on its way from the family's parent."""
    manifest = finished(run_dir / stage)
    way, last = [], manifest
    while "parent" in last.inputs and (last := finished(run_dir / last.inputs["parent"].stage)).do != "train":
        way.append(tokens_read(last))
    rows = [row for row in read_jsonl(run_dir / stage / "metrics.jsonl") if row["kind"] == "eval" and "kl" in row]
    a_step, child = manifest.tokens // manifest.steps, stage.partition("-")[0]
    tokens = [row["step"] * a_step for row in rows]
    return Curve(child, stage, not way, sum(way), way[0] if way else 0, tokens, [row["kl"] for row in rows])


def read(sweep_dir: Path) -> list[list[Curve]]:
    """The curves of every seed. Raises `SystemExit`: a point is not finished."""
    record = read_record(sweep_dir)
    for point in record.points:
        if point.state != "finished":
            raise SystemExit(f"point {point.name} is {point.state}; run the sweep's command again")
    return [
        [
            read_curve(stage, sweep_dir / point.name)
            for stage in point.stages
            if finished(sweep_dir / point.name / stage).do == "distill"
        ]
        for point in record.points
    ]


def reached(curve: Curve, kl: float) -> Reached:
    """Where a curve comes down to `kl` first; between evaluations the logarithm of the KL falls evenly."""
    there = next((place for place, value in enumerate(curve.kl) if value <= kl), None)
    if there is None:
        tokens, bound = float(curve.tokens[-1]), "never"
    elif there == 0:
        tokens, bound = float(curve.tokens[0]), "first"
    else:
        ends = slice(there - 1, there + 1)
        high, low = np.log(curve.kl[ends])
        before, after = curve.tokens[ends]
        tokens, bound = before + (after - before) * float((high - np.log(kl)) / (high - low)), ""
    return Reached(curve.before + tokens, curve.own + tokens, bound)


def earliest(curves: Sequence[Curve], kl: float) -> Reached:
    """Of several runs of a student the one that is there first; where none is, the longest."""
    found = [reached(curve, kl) for curve in curves]
    there = [one for one in found if one.bound != "never"]
    return min(there, key=lambda one: one.charged) if there else max(found, key=lambda one: one.charged)


def multiples(seeds: Sequence[Sequence[Curve]], stage: str, own: bool = False) -> tuple[list[float], list[str]]:
    """Of every seed: how many times the tokens of a scratch stage are those at which the student reached the KL that
    it ended with, all on the way charged or only its `own`; and which of them are bounds, see `Reached`."""
    found, bounds = [], []
    for curves in seeds:
        scratch = next(curve for curve in curves if curve.stage == stage)
        students = [curve for curve in curves if curve.child == scratch.child and not curve.scratch]
        student = earliest(students, scratch.kl[-1])
        found.append(scratch.tokens[-1] / (student.own if own else student.charged))
        bounds.append(student.bound)
    return found, bounds


def told(values: Sequence[float], bounds: Sequence[str]) -> str:
    """Geometric mean over seeds and its interval. With bounds of one kind among the values the mean is a bound; with
    bounds of both it says nothing."""
    kinds = set(bounds) - {""}
    if len(kinds) > 1:
        return "not known"
    sign = {"first": "≥ ", "never": "≤ "}[kinds.pop()] if kinds else ""
    mean, half = mean_and_half(np.log(values).tolist())
    spread = "" if not half > 1e-9 else f" ({np.exp(mean - half):.2f} to {np.exp(mean + half):.2f})"
    return f"{sign}{np.exp(mean):.2f}×{spread}"


def head_starts(seeds: Sequence[Sequence[Curve]]) -> str:
    """Markdown: the multiple of every scratch stage."""
    lines = [
        f"| child | tokens from scratch | KL there ({len(seeds)} seeds) | fewer tokens, all charged | its own alone "
        "| seeds at once, never |",
        "|---|---|---|---|---|---|",
    ]
    for curve in seeds[0]:
        if curve.scratch:
            mean, half = mean_and_half([c.kl[-1] for curves in seeds for c in curves if c.stage == curve.stage])
            every, bounds = multiples(seeds, curve.stage)
            own, _ = multiples(seeds, curve.stage, own=True)
            cells = [curve.child, f"{curve.tokens[-1]:,}", f"{mean:.3f} ± {half:.3f}", told(every, bounds)]
            cells += [told(own, bounds), f"{bounds.count('first')}, {bounds.count('never')}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ends(seeds: Sequence[Sequence[Curve]]) -> str:
    """Markdown: what every stage read and where it began and ended."""
    lines = ["| stage | tokens charged before it | its own | KL at first | KL at last |", "|---|---|---|---|---|"]
    for curve in seeds[0]:
        same = [c for curves in seeds for c in curves if c.stage == curve.stage]
        first, last = (mean_and_half([c.kl[place] for c in same]) for place in (0, -1))
        cells = [curve.stage, f"{curve.before:,}", f"{curve.tokens[-1]:,}"]
        cells += [f"{mean:.3f} ± {half:.3f}" for mean, half in (first, last)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(seeds: Sequence[Sequence[Curve]], path: Path) -> None:
    """A panel for each child: KL over tokens charged, a thin line for each seed and a dot at its end."""
    children = list(dict.fromkeys(curve.child for curve in seeds[0]))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels: Any = figure.subplots(1, len(children), sharey=True, squeeze=False)[0]
    for axes, child in zip(panels, children, strict=True):
        for curve in (curve for curves in seeds for curve in curves if curve.child == child):
            look: Mapping[str, Any] = dict(color=SCRATCH if curve.scratch else STUDENT, alpha=0.6)
            x = [(curve.before + tokens) / 1000 for tokens in curve.tokens]
            axes.plot(x, curve.kl, linewidth=0.9, **look)
            axes.plot(x[-1], curve.kl[-1], "o", markersize=4, **look)
        axes.set_title(child, fontsize=11, loc="left")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator((0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlim(0)
        axes.set_xlabel("thousand tokens charged")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("KL to the parent, nats")
    for colour, label in ((STUDENT, "pruned, then distilled"), (SCRATCH, "from random weights")):
        panels[-1].plot([], [], color=colour, label=label)
    panels[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="directory of a finished sweep")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    seeds = read(given.sweep)
    print(head_starts(seeds), ends(seeds), sep="\n\n")
    if given.picture is not None:
        picture(seeds, given.picture)


if __name__ == "__main__":
    main()
