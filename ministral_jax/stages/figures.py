"""The figures of a stage: what they are called in a log, a table, a sweep and the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

QUANTILE = 1.959964
"""Of the normal distribution: 95 % lie within so many standard errors."""


@dataclass(frozen=True)
class Figure:
    """One held-out figure of a kind of stage."""

    name: str
    """Its key in `metrics.jsonl` (records of kind `eval`) and in the manifest's `metrics`."""
    label: str
    """In words, as a table's column says it."""
    unit: str = ""
    """`nats per token`, `bits per byte`, `bytes per token`; `share` for what is shown as a percentage."""
    better: Literal["lower", "higher"] | None = None
    counted: str = ""
    """Of a share of independent trials, the metric that counts them."""


@dataclass(frozen=True)
class Curve:
    """What is drawn of a kind of stage."""

    figure: str
    """The held-out figure."""
    training: str | None = "loss"
    """What training logs that compares with it."""
    over: Literal["tokens", "step"] = "tokens"


CE = Figure("ce", "cross-entropy", "nats per token", "lower")
ECE = Figure("ece", "calibration error", "share", "lower")
BITS_PER_BYTE = Figure("bits_per_byte", "bits per byte of text", "bits per byte", "lower")
DIGIT_ACCURACY = Figure("digit_accuracy", "answers about images, teacher-forced", "share", "higher")
KL = Figure("kl", "KL to the teacher", "nats per token", "lower")
HELD_OUT = (CE, BITS_PER_BYTE, DIGIT_ACCURACY, ECE)
"""Of every loop over packed rows."""
ACCURACY = Figure("accuracy", "right answers", "share", "higher", "prompts")
PASS_1 = Figure("pass@1", "right answers, sampled", "share", "higher", "prompts")
PASS_8 = Figure("pass@8", "one of eight sampled is right", "share", "higher", "prompts")
REWARD = Figure("reward", "reward", "", "higher")
SAMPLED_REWARD = Figure("sampled_reward", "reward, sampled", "", "higher")
LOOP_RATE = Figure("loop_rate", "answers that loop", "share", "lower", "prompts")
SAMPLED_LOOP_RATE = Figure("sampled_loop_rate", "answers that loop, sampled", "share", "lower", "prompts")
WIN_RATE = Figure("win_rate", "answers better than before", "share", "higher", "prompts")
ANSWERS = (ACCURACY, PASS_1, PASS_8, REWARD, SAMPLED_REWARD, LOOP_RATE, SAMPLED_LOOP_RATE)
"""Of held-out prompts that a stage answers: greedily, but for what is sampled."""


@dataclass(frozen=True)
class Share:
    """A share of `count` held-out prompts or pairs, and the interval in which that of all such lies, 19 times of 20."""

    value: float
    count: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({100 * self.low:.1f} to {100 * self.high:.1f}, n = {self.count})"


def wilson(share: float, count: float) -> tuple[float, float]:
    """The interval of a share of `count` independent answers at 95 % (Wilson, JASA 22, 1927; score interval).

    Of several answers to a prompt, or of answers that are right in part, `count` is that of the prompts: what is equal
    for all answers to one is not seen more often, and nothing from 0 to 1 varies more than what is 0 or 1. So the
    interval is then rather too wide.
    """
    z = QUANTILE**2 / count
    middle, half = (share + z / 2) / (1 + z), math.sqrt(z * (share * (1 - share) + z / 4)) / (1 + z)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def sources_of(metrics: Mapping[str, float]) -> list[str]:
    """Of held-out prompts, where there are several: those whose prompts the figures count as `prompts_<source>`."""
    return [key.removeprefix("prompts_") for key in metrics if key.startswith("prompts_")]


def share_of(metrics: Mapping[str, float], figure: Figure, source: str = "") -> Share | None:
    """A figure of all held-out prompts or pairs, or of those of a source, with its interval; None where it is no share
    of such, or nobody says of how many."""
    end = f"_{source}" if source else ""
    value, count = metrics.get(figure.name + end), metrics.get(figure.counted + end)
    if not figure.counted or value is None or not count or not 0 <= value <= 1:
        return None
    return Share(value, int(count), *wilson(value, count))


def shares_of(metrics: Mapping[str, float], figure: Figure) -> dict[str, Share]:
    """`share_of` each source."""
    found = {source: share_of(metrics, figure, source) for source in sources_of(metrics)}
    return {source: share for source, share in found.items() if share}


def told(figures: tuple[Figure, ...], metrics: Mapping[str, float]) -> list[str]:
    """Of every share that is known by source a line."""
    lines = []
    for figure in figures:
        if by_source := shares_of(metrics, figure):
            parts = ", ".join(f"{source} {share}" for source, share in by_source.items())
            lines.append(f"{figure.label} {share_of(metrics, figure)}: {parts}")
    return lines
