"""How many of the prompts a model solves: by its most probable answer, and by one of k that are drawn. P prompts."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

PASS_AT = (1, 8)
"""The k of pass@k."""


def pass_at_k(passed: Bool[np.ndarray, "P N"], k: int) -> Float[np.ndarray, " P"]:
    """The probability that one of k answers to a prompt is right, estimated without bias from N >= k that were drawn:
    1 - C(N - c, k) / C(N, k), of which c are right (Chen et al., arXiv 2107.03374, eq. 1)."""
    count = passed.shape[1]
    wrong = count - passed.sum(axis=1)
    return 1 - np.prod([np.maximum(wrong - i, 0) / (count - i) for i in range(k)], axis=0)
