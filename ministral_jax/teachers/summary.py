"""What a logit store says of itself, split by split: its size, and how much of the teacher it leaves out."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ministral_jax.settings import Frozen


class TailMass(Frozen):
    """Probability outside the stored entries, per counted token; percentiles are upper edges of histogram bins."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Histogram(Frozen):
    """Tokens whose tail mass is at most each edge and above the one before."""

    at_most: tuple[float, ...]
    tokens: tuple[int, ...]


class SplitSummary(Frozen):
    """One split of a store: `manifest.json`, under `store`."""

    codec: dict[str, Any]
    rows: int
    shards: int
    bytes: dict[str, int]
    """On disk, by array."""
    bytes_per_token: float
    tokens: int
    """Counted ones."""
    teacher_entropy: float | None = None
    """nats per token."""
    unique_ids: float | None = None
    """Different ids among the draws of a token."""
    tail_mass: TailMass | None = None
    gradient_error_bound: dict[str, float] | None = None
    """`mean` and `p99` of twice the tail mass."""
    tail_entropy: float | None = None
    curve: dict[int, float] = Field(default_factory=dict)
    """Mean tail mass by how many entries would be kept."""
    tail_histogram: Histogram | None = None
    tail_by_shard: dict[str, tuple[float, ...]] | None = None
    """`mean` and `p99` of each file."""

    def figures(self) -> dict[str, float]:
        """Means per token: what a sweep and a table compare."""
        means = {
            "bytes_per_token": self.bytes_per_token,
            "teacher_entropy": self.teacher_entropy,
            "unique_ids": self.unique_ids,
            "tail_mass": self.tail_mass and self.tail_mass.mean,
            "gradient_error_bound": self.gradient_error_bound and self.gradient_error_bound["mean"],
            "tail_entropy": self.tail_entropy,
        }
        return {name: mean for name, mean in means.items() if mean is not None}
