"""Attention as one kernel of an accelerator, a module for each, all called alike.

`unserved(chunk, head_width)` says which shapes a module does not take, and `attend(q, k, v, segments, index, causal)`
is `attention.attend_parts` of queries that are scaled: `segments` of queries and keys, `index` of the queries in the
whole sequence, in which the keys are the tokens 0, 1, ... in order.
"""

from __future__ import annotations

KEEP = "keep"
"""Name of results that are worth their memory until the backward pass."""
