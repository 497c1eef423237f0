"""The figures of a stage: what they are called in a log, a table, a sweep and the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
REWARD_ACCURACY = Figure("reward_accuracy", "right answers", "share", "higher")
REWARD = Figure("reward", "reward", "", "higher")
LOOP_RATE = Figure("loop_rate", "answers that loop", "share", "lower")
ANSWERS = (REWARD_ACCURACY, REWARD, LOOP_RATE)
"""Of held-out prompts that a stage answers."""
