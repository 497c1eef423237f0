"""Figures of held-out positions, each with the interval that other documents would move it in. NumPy, in float64.

The unit of chance is the document: tokens of one are alike, so an interval over tokens would be far too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

CALIBRATION_BINS = 15
RESAMPLES = 1000
LEVEL = 0.95
OCTAVES = 20
"""By position: 0 to 31, 32 to 63, 64 to 127 and so on; the last one has no end."""
_FIRST_OCTAVE = 5
Readings = dict[str, Shaped[np.ndarray, "B T"]]
Sums = dict[str, Float[np.ndarray, "D ..."]]


@dataclass(frozen=True)
class Octave:
    """Means over the counted positions from `start` up to twice that (from 0 up to 31 in the first one)."""

    start: int
    counted: float
    ce: float
    kl: float | None = None
    answers: float = 0.0
    """Positions that predict a token of an answer about an image."""
    accuracy: float | None = None
    """How often that token is the most probable one; None without any."""


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation found.

    figures: `kl` and `ce` in nats per counted token; `bits_per_byte` over text; `digit_accuracy` over answers about
        images; `ece` the expected calibration error of the most probable token (Guo et al. 2017, eq. 3; 15 bins).
    intervals: of each figure, in which 95 % of it lies when documents are drawn anew (percentile bootstrap).
    documents: which had a counted position.
    positions: by position within a document, in octaves.
    """

    figures: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    documents: int = 0
    positions: tuple[Octave, ...] = ()

    def details(self) -> dict[str, Any]:
        """What a manifest says beside the figures."""
        return {key: value for key, value in asdict(self).items() if key != "figures"}


def document_sums(read: Readings, teacher_context: int | None = None) -> tuple[Int[np.ndarray, " D"], Sums]:
    """Sums over the positions of each document of a batch, and which documents these are.

    Args:
        read: `ce`, `confidence`, `prediction` (and `kl`) as `losses.chunked.evaluate_positions` gives them; `labels`,
            `loss_mask`, `answer_mask`, `text_bytes`, `positions` and `document` as `data.pipeline.held_out` does.
        teacher_context: `kl` counts at positions before that.
    """
    found, places = np.unique(read["document"], return_inverse=True)
    places = places.reshape(read["document"].shape)
    count, mask, answers = len(found), read["loss_mask"], read["answer_mask"]
    right = read["prediction"] == read["labels"]

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(places.ravel(), values.ravel().astype(np.float64), count)

    def binned(values: np.ndarray, bins: np.ndarray, size: int) -> np.ndarray:
        both = places * size + bins
        return np.bincount(both.ravel(), values.ravel().astype(np.float64), count * size).reshape(count, size)

    # of a model that has diverged it is no number; what that makes of the figures, the loop says
    sure = np.minimum(np.nan_to_num(read["confidence"] * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    # the number of binary digits of a position, less those of the first octave
    octave = np.frexp(np.asarray(read["positions"], np.float64))[1] - _FIRST_OCTAVE
    octave = np.clip(octave, 0, OCTAVES - 1)
    sums = {
        "counted": summed(mask),
        "ce": summed(mask * read["ce"]),
        "nats": summed(np.where(read["text_bytes"] > 0, read["ce"], 0)),
        "bytes": summed(read["text_bytes"]),
        "right": summed(answers * right),
        "answers": summed(answers),
        "gap": binned(mask * (read["confidence"].astype(np.float64) - right), sure, CALIBRATION_BINS),
        "octave": binned(mask, octave, OCTAVES),
        "octave_ce": binned(mask * read["ce"], octave, OCTAVES),
        "octave_answers": binned(answers, octave, OCTAVES),
        "octave_right": binned(answers * right, octave, OCTAVES),
    }
    if "kl" in read:
        known = mask if teacher_context is None else mask * (read["positions"] < teacher_context)
        sums |= {"kl": summed(known * read["kl"]), "known": summed(known)}
        sums |= {
            "octave_kl": binned(known * read["kl"], octave, OCTAVES),
            "octave_known": binned(known, octave, OCTAVES),
        }
    return found, sums


def held_out_figures(batches: Sequence[tuple[Int[np.ndarray, " D"], Sums]]) -> HeldOut:
    """Figures over all documents of these batches. A document that spans batches counts once."""
    if not batches:
        return HeldOut()
    found, places = np.unique(np.concatenate([documents for documents, _ in batches]), return_inverse=True)
    sums: Sums = {}
    for key in batches[0][1]:
        parts = np.concatenate([sums[key] for _, sums in batches])
        sums[key] = np.zeros((len(found), *parts.shape[1:]))
        np.add.at(sums[key], places, parts)
    counting = (sums["counted"] > 0) | (sums["bytes"] > 0) | (sums["answers"] > 0)
    sums = {key: values[counting] for key, values in sums.items()}
    count = int(counting.sum())
    once = {key: float(value[0]) for key, value in _ratios(sums, np.ones((1, count))).items()}
    return HeldOut(once, _intervals(sums, count), count, _octaves(sums))


def _ratios(sums: Sums, weights: Float[np.ndarray, "N D"]) -> dict[str, Float[np.ndarray, " N"]]:
    """Every figure, for each of N ways to weight the documents. Left out is what no document has anything of."""
    total = {key: np.tensordot(weights, values, 1) for key, values in sums.items() if not key.startswith("octave")}
    result = {"ce": _over(total["ce"], np.maximum(total["counted"], 1))}
    if "kl" in total:
        result["kl"] = _over(total["kl"], np.maximum(total["known"], 1))
    if sums["bytes"].any():
        result["bits_per_byte"] = _over(total["nats"] / np.log(2), total["bytes"])
    if sums["answers"].any():
        result["digit_accuracy"] = _over(total["right"], total["answers"])
    return result | {"ece": _over(np.abs(total["gap"]).sum(1), np.maximum(total["counted"], 1))}


def _over(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by."""
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _intervals(sums: Sums, count: int) -> dict[str, tuple[float, float]]:
    if count < 2:
        return {}
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    drawn = _ratios(sums, weights.astype(np.float64))
    return {key: (float(low), float(high)) for key, x in drawn.items() for low, high in [np.nanquantile(x, ends)]}


def _octaves(sums: Sums) -> tuple[Octave, ...]:
    total = {key: values.sum(0) for key, values in sums.items() if key.startswith("octave")}
    counted, none = total["octave"], np.zeros(OCTAVES)

    def mean(of: str, over: str, n: int) -> float | None:
        count = total.get(over, none)[n]
        return float(total[of][n] / count) if count else None

    starts = [0, *(1 << (_FIRST_OCTAVE + n) for n in range(OCTAVES - 1))]
    return tuple(
        Octave(
            start,
            float(counted[n]),
            float(total["octave_ce"][n] / counted[n]),
            mean("octave_kl", "octave_known", n),
            float(total["octave_answers"][n]),
            mean("octave_right", "octave_answers", n),
        )
        for n, start in enumerate(starts)
        if counted[n]
    )
