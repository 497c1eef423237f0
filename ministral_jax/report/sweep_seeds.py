"""A sweep over seeds alone: whether stages of post-training learn, beyond what seeds do to them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from ministral_jax.files import read_jsonl
from ministral_jax.report.collect import Row, rows_of
from ministral_jax.report.markup import Child, Html, el, figure, paragraph, row, section, table
from ministral_jax.report.style import accent
from ministral_jax.report.sweep_plots import over_seeds
from ministral_jax.report.units import MISSING, decimal, listing, percent, plural

LIKELY = 0.95
"""Of the intervals."""
_CHIEF = ("win_rate", "judge_accuracy", "reward", "reward_accuracy")
_DRAWN = ("reward_accuracy", "reward", "win_rate", "loop_rate", "judge_accuracy")
_NAMES = {
    "reward_accuracy": "answered right",
    "reward": "reward",
    "win_rate": "win rate",
    "loop_rate": "loop rate",
    "judge_accuracy": "judged right",
    "judge_ece": "judge\u2019s ECE, raw and calibrated",
}
_LOWER_IS_BETTER = ("loop_rate", "judge_ece")
_NO_SHARES = ("reward", "judge_ece")


@dataclass(frozen=True)
class Change:
    """A held-out metric before and after a stage, of every seed that came as far as the others."""

    key: str
    pairs: list[tuple[float, float]]

    @property
    def changes(self) -> list[float]:
        return [after - before for before, after in self.pairs]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.changes)

    @property
    def half(self) -> float | None:
        """Half the width of the interval in which the mean over all seeds lies, by Student's t; None of one seed."""
        n = len(self.pairs)
        return float(stdtrit(n - 1, 0.5 + LIKELY / 2)) * statistics.stdev(self.changes) / n**0.5 if n > 1 else None

    @property
    def verdict(self) -> str:
        if self.half is None:
            return "one seed"
        if abs(self.mean) <= self.half:
            return "within seed noise" if self.half else "no change"
        return "better" if (self.mean > 0) != (self.key in _LOWER_IS_BETTER) else "worse"


@dataclass(frozen=True)
class Replicates:
    """A stage that every seed made anew."""

    stage: str
    evals: list[list[Row]]
    """Of each seed."""

    @property
    def keys(self) -> list[str]:
        """Metrics that answers or a judge are compared by, each followed by its sources."""
        found = {key for rows in self.evals for evaluation in rows for key in evaluation}
        keys = []
        for key in _NAMES:
            if key in found:
                keys.append(key)
            if key == "reward_accuracy":
                keys += sorted(other for other in found if other.startswith(f"{key}_"))
        return keys

    def change(self, key: str) -> Change | None:
        ends = [rows[-1].get("step", 0.0) for rows in self.evals if rows]
        pairs = []
        for rows in self.evals:
            if len(rows) > 1 and rows[-1].get("step", 0.0) == max(ends):
                before = rows[-1].get("judge_ece_before") if key == "judge_ece" else rows[0].get(key)
                after = rows[-1].get(key)
                if before is not None and after is not None and math.isfinite(before) and math.isfinite(after):
                    pairs.append((before, after))
        return Change(key, pairs) if pairs else None

    @property
    def chief(self) -> Change | None:
        return next((change for key in _CHIEF if (change := self.change(key))), None)


def replicates(record: dict[str, Any], sweep_dir: Path) -> list[Replicates]:
    """Stages whose answers are examined, or which judge; none when more than seeds varies."""
    if any(key.rpartition(".")[2] != "seed" for key in record["keys"]):
        return []
    found = []
    for stage in dict.fromkeys(name for point in record["points"] for name in point["stages"]):
        places = list(dict.fromkeys(p["stages"][stage] for p in record["points"] if stage in p["stages"]))
        evals = [rows_of(read_jsonl(sweep_dir / place / "metrics.jsonl"), "eval") for place in places]
        made = Replicates(stage, [rows for rows in evals if rows])
        if len(places) > 1 and made.keys:
            found.append(made)
    return found


def headline(found: Sequence[Replicates]) -> str:
    told = [(made.stage, made.chief) for made in found]
    learns = [stage for stage, change in told if change and change.verdict == "better"]
    others = [stage for stage, change in told if stage not in learns]
    seeds = _count(found)
    if not learns:
        return f"Over {seeds} nothing is learned beyond seed noise"
    text = f"Over {seeds} {listing(learns)} {'learns' if len(learns) == 1 else 'learn'} beyond seed noise"
    return text + (f", {listing(others)} {'does' if len(others) == 1 else 'do'} not" if others else "")


def _count(found: Sequence[Replicates]) -> str:
    return plural(max(len(made.evals) for made in found), "seed")


def seeds(found: Sequence[Replicates]) -> Html | None:
    if not found:
        return None
    lead = (
        "Of every stage, what held-out figures were before its training and at its end. The interval is where the mean "
        "change over all seeds lies with 95 % confidence, by Student\u2019s t; a change is told better or worse when "
        "the interval leaves out zero. It speaks of other seeds on the same held-out prompts."
    )
    parts = [_stage(made, accent(1 + i)) for i, made in enumerate(found)]
    return section("seeds", "Seeds", f"What each stage changes, over {_count(found)}", lead, parts)


def _stage(made: Replicates, colour: str) -> Child:
    changes = [change for key in made.keys if (change := made.change(key))]
    headers: list[Child] = ["held out", "before", "after", "change", "95 % interval", "seeds that rise", "verdict"]
    rows = [row(_name(change.key), _cells(change)) for change in changes]
    counted = max((len(change.pairs) for change in changes), default=0)
    caption = f"Mean and standard deviation over {plural(counted, 'seed')}; shares change by percentage points."
    if counted < len(made.evals):
        caption += f" {plural(len(made.evals) - counted, 'other').capitalize()} did not come as far."
    figures = [drawn for key in _DRAWN if (drawn := _figure(made, key, colour))]
    return [
        el("h3", made.stage, class_="group"),
        table(caption, headers, rows) if rows else paragraph("No two evaluations yet.", "note"),
        el("div", figures, class_="grid") if figures else None,
    ]


def _name(key: str) -> str:
    source = key.removeprefix("reward_accuracy_")
    return _NAMES.get(key) or f"{_NAMES['reward_accuracy']}, {source}"


def _write(key: str) -> Callable[[float | None], str]:
    return decimal if key in _NO_SHARES else percent


def _signed(write: Callable[[float], str]) -> Callable[[float], str]:
    return lambda value: ("\u2212" if value < 0 else "+") + write(abs(value))


def _cells(change: Change) -> list[Child]:
    write, n = _write(change.key), len(change.pairs)
    signed = _signed(write)

    def spread(values: list[float], told: Callable[[float], str]) -> Child:
        deviation = el("small", f"\u00b1 {write(statistics.stdev(values))}") if n > 1 else None
        return el("td", told(statistics.fmean(values)), deviation)

    before, after = ([pair[i] for pair in change.pairs] for i in (0, 1))
    half, verdict = change.half, change.verdict
    low_high = f"{signed(change.mean - half)} to {signed(change.mean + half)}" if half is not None else MISSING
    rising = f"{sum(x > 0 for x in change.changes)} of {n}"
    kind = {"better": "best", "worse": "wrong"}.get(verdict)
    return [
        spread(before, write),
        spread(after, write),
        spread(change.changes, signed),
        low_high,
        rising,
        el("td", verdict, class_=kind),
    ]


def _figure(made: Replicates, key: str, colour: str) -> Html | None:
    name = _name(key)
    alt = f"{name} of {made.stage} against steps, every seed."
    picture = over_seeds(made.evals, key, colour, f"held out, {name}", key not in _NO_SHARES, alt)
    change = made.change(key)
    title = f"{name[0].upper()}{name[1:]}" + (f": {change.verdict}" if change else "")
    return figure(title, picture, "Thin: each seed; thick: their mean.") if picture else None
