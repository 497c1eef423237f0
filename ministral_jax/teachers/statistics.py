"""What a logit store says about its teacher: sums per shard, added up, and summarised.

With a tail of mass t, the loss on S entries and a tail (`losses/sparse.py`) has a gradient in the student's logits
whose L1 error against that of the full KL is 2 t TV(p(.|tail), q(.|tail)) <= 2 t per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from ministral_jax.teachers import codecs
from ministral_jax.teachers.codecs import Codec, SampledCodec, TopKCodec
from ministral_jax.teachers.store_format import Arrays, ShardRecord
from ministral_jax.teachers.summary import Histogram, SplitSummary, TailMass

_LOOKED_UP = 4096  # tokens at a time, float64 for each of their ids
_DECADES, _PER_DECADE = 9, 20
# Bin i of the histogram ends at EDGES[i]; the first holds everything below 1e-9.
EDGES = 10 ** (np.arange(_DECADES * _PER_DECADE + 1) / _PER_DECADE - _DECADES)


def statistics(codec: Codec, arrays: Arrays) -> dict[str, Any]:
    """Sums over the counted tokens of n rows as they lie on disk (`codecs.layout`): plain numbers and lists. `entropy`
    is the teacher's, with `topk` from quantised log-probabilities; `tail_histogram` is over `EDGES`."""
    counted = arrays["counted"] > 0
    sums: dict[str, Any] = {"tokens": int(counted.sum())}
    match codec:
        case TopKCodec(bits=bits):
            tail = np.exp(codecs.decode_tail(arrays["tail"][counted], np.float64))
            tail_entropy = codecs.decode_entropy(arrays["tail_entropy"][counted], np.float64)
            codes = [arrays[name][counted] for name in ("logprobs", "forced") if name in arrays]
            bins = np.minimum(np.searchsorted(EDGES, tail), len(EDGES) - 1)
            return sums | {
                "tail_mass": float(tail.sum()),
                "tail_histogram": np.bincount(bins, minlength=len(EDGES)).tolist(),
                "entropy": _entropy(np.concatenate(codes, axis=-1), bits, tail, tail_entropy),
                "tail_entropy": float(tail_entropy.sum()),
                "curve": arrays["curve"].sum(axis=0, dtype=np.float64).tolist(),
            }
        case SampledCodec():
            entropy = float(codecs.decode_entropy(arrays["entropy"][counted], np.float64).sum())
            return sums | {"entropy": entropy, "unique_ids": int((arrays["counts"][counted] > 0).sum())}
    return sums


def summarise(codec: Codec, records: Sequence[ShardRecord]) -> SplitSummary:
    """Means per counted token, percentiles and bounds of all shards of a split together.

    Percentiles are upper edges of bins, at most 12 % (a twentieth of a decade) too large.
    """
    add = lambda a, b: {name: np.add(a[name], b[name]).tolist() for name in a}
    sums: dict[str, Any] = reduce(add, [record.statistics for record in records]) if records else {"tokens": 0}
    size: dict[str, int] = reduce(add, [record.bytes for record in records]) if records else {}
    tokens = max(sums["tokens"], 1)
    found: dict[str, Any] = {name: sums[name] / tokens for name in ("tail_entropy", "unique_ids") if name in sums}
    if "entropy" in sums:
        found["teacher_entropy"] = sums["entropy"] / tokens
    if "tail_mass" in sums:
        tail, by_shard = _tail_mass(sums), [_tail_mass(record.statistics) for record in records]
        found |= {
            "tail_mass": tail,
            "gradient_error_bound": {"mean": 2 * tail.mean, "p99": 2 * tail.p99},
            "curve": {codecs.SMALLEST_SIZE * 2**i: total / tokens for i, total in enumerate(sums["curve"])},
            "tail_histogram": Histogram(at_most=tuple(EDGES.tolist()), tokens=tuple(sums["tail_histogram"])),
            "tail_by_shard": {"mean": tuple(t.mean for t in by_shard), "p99": tuple(t.p99 for t in by_shard)},
        }
    return SplitSummary(
        codec=codec.model_dump(mode="json"),
        rows=sum(record.rows for record in records),
        shards=len(records),
        bytes=size,
        bytes_per_token=sum(size.values()) / tokens,
        tokens=sums["tokens"],
        **found,
    )


def _tail_mass(sums: dict[str, Any]) -> TailMass:
    below = np.cumsum(sums["tail_histogram"])
    percentile = lambda q: float(EDGES[np.searchsorted(below, q * below[-1])])
    mean = sums["tail_mass"] / max(sums["tokens"], 1)
    return TailMass(mean=mean, p50=percentile(0.5), p90=percentile(0.9), p99=percentile(0.99), max=percentile(1))


def _entropy(codes: np.ndarray, bits: int, tail: np.ndarray, tail_entropy: np.ndarray) -> float:
    """Sum over tokens [n] of -Σ p log p, p normalised over W ids [n, W] and the tail. Sums are looked up per code."""
    log_p = codecs.decode_log_probs(np.arange(2**bits, dtype=np.uint32), bits, np.float64)
    p = np.exp(log_p)
    summed = lambda table: np.concatenate([table[part].sum(axis=-1) for part in np.array_split(codes, parts)])
    parts = 1 + len(codes) // _LOOKED_UP
    mass = summed(p) + tail
    total = summed(p * log_p) + tail * (np.log(np.where(tail > 0, tail, 1)) - tail_entropy)
    return float(np.sum(np.log(mass) - total / mass))
