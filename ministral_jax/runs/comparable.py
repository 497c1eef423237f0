"""Which figures may stand side by side: of stages that are current, on rows of one length, and further apart than
chance moves them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

from ministral_jax.stages.figures import BITS_PER_BYTE, CE, ECE, KL, QUANTILE
from ministral_jax.stages.manifest import Manifest

OF_LENGTH = tuple(figure.name for figure in (CE, ECE, BITS_PER_BYTE, KL))
"""Figures that depend on the length of the rows they are read on."""
T = TypeVar("T", bound=Hashable)


def stale_stages(made: Mapping[str, Manifest], digests: Mapping[str, str | None]) -> dict[str, str]:
    """The finished stages whose inputs were made anew since, or whose inputs' inputs were, each with the reason.

    Args:
        made: manifests of the finished stages.
        digests: of the stages that are there now, None where one is being made; a stage that is not there is not newer
            than what was made from it.

    Returns:
        by stage what it was, such as "made from another 8b-short than the one that is here now".
    """
    found: dict[str, str] = {}
    for name, manifest in made.items():
        for source in manifest.inputs.values():
            if (here := digests.get(source.stage, source.digest)) != source.digest:
                now = "is here now" if here else "is being made"
                found[name] = f"made from another {source.stage} than the one that {now}"
    while more := {
        name: f"made from {source.stage}, which is stale"
        for name, manifest in made.items()
        for source in manifest.inputs.values()
        if source.stage in found and name not in found
    }:
        found |= more
    return found


def row_length(manifest: Manifest) -> int | None:
    """Tokens of the rows that a stage's held-out figures were read on; None of a stage that reads no rows."""
    batch = manifest.config.get("batch")
    return batch.get("length") if isinstance(batch, dict) else None


def most_common(values: Iterable[T]) -> T | None:
    """Of several with equal counts the first; None of nothing. Figures of a column are shown where the row length is
    the most common one of the column, and elsewhere the other length stands in their place."""
    counts = Counter(values)
    return max(counts, key=lambda value: counts[value]) if counts else None


def differ(before: float, after: float, count: int) -> bool:
    """Whether two shares of `count` answers each are further apart than chance moves them, 19 times of 20.

    The interval of Agresti and Caffo (The American Statistician, 2000) for independent answers, which is the wider one
    for answers to the same prompts.
    """
    low, high = ((share * count + 1) / (count + 2) for share in (before, after))
    error = math.sqrt((low * (1 - low) + high * (1 - high)) / (count + 2))
    return abs(high - low) > QUANTILE * error
