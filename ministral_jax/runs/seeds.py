"""What a stage changes whatever its seed: the stages of a sweep over seeds alone, before and after."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from ministral_jax.stages.figures import Figure

LIKELY = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class Change:
    """A held-out figure before and after a stage, of every seed."""

    figure: Figure
    pairs: Sequence[tuple[float, float]]

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
        """`better` or `worse` when the interval leaves out zero."""
        if self.half is None:
            return "one seed"
        if abs(self.mean) <= self.half:
            return "within seed noise" if self.half else "no change"
        return "better" if (self.mean > 0) == (self.figure.better == "higher") else "worse"
