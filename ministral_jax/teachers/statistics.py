"""What a logit store says about its teacher: sums per shard, added up, and summarised.

With a tail of mass t, the loss on S entries and a tail (`sparse.py`) has a gradient in the student's logits whose L1
error against that of the full KL is 2 t TV(p(.|tail), q(.|tail)) <= 2 t per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from ministral_jax.teachers.codecs import SMALLEST_SIZE, Arrays, Codec, SampledCodec, TopKCodec
from ministral_jax.teachers.quantise import decode_entropy, decode_log_probs, decode_tail

_LOOKED_UP = 4096  # tokens at a time, float64 for each of their ids
_DECADES, _PER_DECADE = 9, 20
# Bin i of the histogram ends at EDGES[i]; the first holds everything below 1e-9.
EDGES = 10 ** (np.arange(_DECADES * _PER_DECADE + 1) / _PER_DECADE - _DECADES)


def statistics(codec: Codec, arrays: Arrays, forced: tuple[int, ...]) -> dict[str, Any]:
    """Sums over the counted tokens of n rows as they lie on disk (`codecs.layout`): plain numbers and lists.

    `tokens` for every codec. topk: `tail_mass`, its histogram `tail_histogram` over `EDGES`, `entropy` of the teacher
    (from quantised log-probabilities), `tail_entropy`, and `curve`. sampled: `entropy` and `unique_ids`.
    """
    counted = arrays["counted"] > 0
    sums: dict[str, Any] = {"tokens": int(counted.sum())}
    match codec:
        case TopKCodec(bits=bits):
            tail = np.exp(decode_tail(arrays["tail"][counted], np.float64))
            tail_entropy = decode_entropy(arrays["tail_entropy"][counted], np.float64)
            codes = [arrays[name][counted] for name in ("logprobs", "forced") if name in arrays]
            bins = np.minimum(np.searchsorted(EDGES, tail), len(EDGES) - 1)
            sums |= {
                "tail_mass": float(tail.sum()),
                "tail_histogram": np.bincount(bins, minlength=len(EDGES)).tolist(),
                "entropy": _entropy(np.concatenate(codes, axis=-1), bits, tail, tail_entropy),
                "tail_entropy": float(tail_entropy.sum()),
                "curve": arrays["curve"].sum(axis=0, dtype=np.float64).tolist(),
            }
        case SampledCodec():
            sums |= {
                "entropy": float(decode_entropy(arrays["entropy"][counted], np.float64).sum()),
                "unique_ids": int((arrays["counts"][counted] > 0).sum()),
            }
    return sums


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of all shards together; {} of none."""

    add = lambda a, b: {name: np.add(a[name], b[name]).tolist() for name in a}
    return reduce(add, parts) if parts else {}


def summarise(merged: dict[str, Any]) -> dict[str, Any]:
    """Means per counted token, percentiles and bounds.

    `tokens`; `teacher_entropy` and `tail_entropy` in nats; `unique_ids`; `tail_mass` as mean, p50, p90, p99 and max;
    `gradient_error_bound`, twice its mean and p99; `curve`, {entries: mean tail mass} with the entries as text, as in
    JSON. Percentiles are upper edges of bins, at most 12 % (a twentieth of a decade) too large.
    """
    tokens = max(merged.get("tokens", 0), 1)
    mean = lambda name: merged[name] / tokens
    result: dict[str, Any] = {"tokens": merged.get("tokens", 0)}
    if "entropy" in merged:
        result["teacher_entropy"] = mean("entropy")
    if "unique_ids" in merged:
        result["unique_ids"] = mean("unique_ids")
    if "tail_mass" in merged:
        below = np.cumsum(merged["tail_histogram"])
        percentile = lambda q: float(EDGES[np.searchsorted(below, q * below[-1])])
        tail = {"mean": mean("tail_mass")} | {f"p{q}": percentile(q / 100) for q in (50, 90, 99)}
        result["tail_mass"] = tail | {"max": percentile(1)}
        result["gradient_error_bound"] = {"mean": 2 * tail["mean"], "p99": 2 * tail["p99"]}
        result["tail_entropy"] = mean("tail_entropy")
        result["curve"] = {str(SMALLEST_SIZE * 2**i): total / tokens for i, total in enumerate(merged["curve"])}
    return result


def _entropy(codes: np.ndarray, bits: int, tail: np.ndarray, tail_entropy: np.ndarray) -> float:
    """Sum over tokens [n] of -Σ p log p, p normalised over W ids [n, W] and the tail. Sums are looked up per code."""
    log_p = decode_log_probs(np.arange(2**bits, dtype=np.uint32), bits, np.float64)
    p = np.exp(log_p)
    summed = lambda table: np.concatenate([table[part].sum(axis=-1) for part in np.array_split(codes, parts)])
    parts = 1 + len(codes) // _LOOKED_UP
    mass = summed(p) + tail
    total = summed(p * log_p) + tail * (np.log(np.where(tail > 0, tail, 1)) - tail_entropy)
    return float(np.sum(np.log(mass) - total / mass))
