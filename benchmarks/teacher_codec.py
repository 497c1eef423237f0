"""Table and picture of docs/teacher_codec.md from a finished `ministral-jax sweep configs/studies/teacher_codec.yaml`.

python benchmarks/teacher_codec.py runs/teacher_codec --picture docs/teacher_codec.svg
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

STUDENT = "student"
COLOURS = {"topk": "#2f5d8a", "sampled": "#b3552e", "independent": "#b3552e", "hidden": "#3f7d4e"}
LABELS = {"topk": "top S, tail bucket", "sampled": "S draws, systematic", "independent": "S draws, independent"}


@dataclass
class Arm:
    """One teacher: figures of its students, one per seed, and of its store."""

    name: str
    kl: list[float] = field(default_factory=list)
    ece: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    store: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.name.split("-")[0]

    @property
    def entries(self) -> int:
        return int(self.name.split("-")[1])


def read(sweep_dir: Path) -> list[Arm]:
    record = json.loads((sweep_dir / "sweep.json").read_text())
    arms: dict[str, Arm] = {}
    for point in record["points"]:
        assert point["state"] == "finished", f"{point['name']} is {point['state']}"
        teacher = point["settings"]["stages.student.teacher"]
        name = teacher if isinstance(teacher, str) else teacher["store"]
        arm = arms.setdefault(name, Arm(name))
        figures = point["figures"][STUDENT]
        arm.kl.append(figures["kl"])
        arm.ece.append(figures["ece"])
        arm.bits.append(figures["bits_per_byte"])
        if not isinstance(teacher, str):
            manifest = json.loads((sweep_dir / point["stages"][name] / "manifest.json").read_text())
            arm.store = manifest["store"]["train"]
    return list(arms.values())


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def table(arms: list[Arm]) -> str:
    """Markdown. Differences to the online teacher are taken seed by seed: both read the same rows in the same order."""
    online = next(arm for arm in arms if arm.name == "parent")
    lines = [
        "| teacher | bytes per token | tail mass | gradient error at most | held-out KL | more than online | ECE |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        kl, ece = mean_and_error(arm.kl), mean_and_error(arm.ece)
        more = mean_and_error([a / b - 1 for a, b in zip(arm.kl, online.kl, strict=True)])
        tail = arm.store.get("tail_mass", {}).get("mean")
        cells = [
            "online" if arm is online else arm.name,
            f"{arm.store['bytes_per_token']:.1f}" if arm.store else "",
            "" if tail is None else f"{tail:.3f}",
            "" if tail is None else f"{2 * tail:.2f}",
            f"{kl[0]:.4f} ± {kl[1]:.4f}",
            "" if arm is online else f"{more[0]:+.1%} ± {more[1]:.1%}",
            f"{ece[0]:.2%} ± {ece[1]:.2%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(arms: list[Arm], path: Path) -> None:
    """KL and calibration error over bytes per token, standard errors over seeds; the online teacher as a line."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    online = next(arm for arm in arms if arm.name == "parent")
    series: dict[str, list[Arm]] = defaultdict(list)
    for arm in arms:
        if arm is not online:
            series[arm.kind].append(arm)
    for axes, key, title in zip(panels, ("kl", "ece"), ("KL to the teacher, nats", "calibration error"), strict=True):
        level, error = mean_and_error(getattr(online, key))
        axes.axhspan(level - error, level + error, color="#999999", alpha=0.3, linewidth=0)
        axes.axhline(level, color="#555555", linewidth=1, label="online")
        for kind, members in series.items():
            members = sorted(members, key=lambda arm: arm.store["bytes_per_token"])
            x = [arm.store["bytes_per_token"] for arm in members]
            y, e = zip(*(mean_and_error(getattr(arm, key)) for arm in members), strict=True)
            style = dict(marker="x" if kind == "independent" else "o", markersize=5, capsize=2, color=COLOURS[kind])
            axes.errorbar(x, y, e, label=LABELS.get(kind, "hidden state, bf16"), **style)
            if kind in ("topk", "sampled") and key == "kl":
                for arm, a, b in zip(members, x, y, strict=True):
                    offset = (4, 6) if kind == "topk" else (4, -12)
                    axes.annotate(str(arm.entries), (a, b), offset, textcoords="offset points", fontsize=8)
        axes.set_xscale("log")
        _ticks(axes.xaxis, (20, 50, 100, 200, 400), "{:g}")
        axes.set_xlabel("bytes per token")
        axes.set_title(title, fontsize=11, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    _ticks(panels[0].yaxis, (0.05, 0.07, 0.1, 0.15), "{:g}")
    panels[1].yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def _ticks(axis: Any, places: tuple[float, ...], text: str) -> None:
    axis.set_major_locator(FixedLocator(places))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: text.format(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    arms = read(args.sweep)
    print(table(arms))
    if args.picture is not None:
        picture(arms, args.picture)


if __name__ == "__main__":
    main()
