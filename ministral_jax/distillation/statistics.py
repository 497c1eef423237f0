"""What a logit store says about its teacher: per shard, added up, and summarised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ministral_jax.distillation.codecs import Arrays, Codec


def statistics(codec: Codec, arrays: Arrays, forced: tuple[int, ...]) -> dict[str, Any]:
    """Sums and histograms over the arrays on disk of one shard, plain numbers and lists."""
    raise NotImplementedError


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of all shards together."""
    raise NotImplementedError


def summarise(merged: dict[str, Any]) -> dict[str, Any]:
    """Means, percentiles and bounds."""
    raise NotImplementedError
