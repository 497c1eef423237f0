"""Attention as one kernel of an accelerator, a module for each, all called alike.

`unserved(asked)` says what a module lacks for what it is asked, "" where it serves, and
`attend(q, k, v, segments, index, causal)` is `attention.attend_parts` of queries that are scaled: `segments` of queries
and keys, `index` of the queries in the whole sequence, in which the keys are the tokens 0, 1, ... in order.
"""

from __future__ import annotations

from typing import NamedTuple

PADDING = 2**30
"""What the segments of padding begin with; each token of it has one of its own."""
KEEP = "attention"
"""Name of attention's results, output and log-sum-exp, for what is kept until the backward pass."""


class Asked(NamedTuple):
    """What a kernel is asked to do: queries in chunks of so many tokens, of as many keys; a chunk is smaller where a
    mesh cuts the row."""

    chunk: int
    keys: int
    head_width: int
    dtype: str

    @staticmethod
    def of_row(length: int, shards: int, causal: bool, head_width: int, dtype: str) -> Asked:
        """Of rows of `length` tokens that lie in so many parts: causal ones that are cut in two chunks each."""
        return Asked(length // (shards * (2 if shards > 1 and causal else 1)), length, head_width, dtype)
