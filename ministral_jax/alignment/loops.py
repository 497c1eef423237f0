"""When a text goes round in circles: what rewards punish and evaluation counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

COPIES, LEAST, LONGEST = 4, 48, 512


def is_looping(tokens: Sequence[int]) -> bool:
    """Whether a text ends in a block of tokens that is repeated to its last token.

    The rule: for some period p of 1 to 512 tokens, each of the last max(4 p, 48) tokens but the first p of them equals
    the one p before it. So four copies of a block at least, the last of which may be cut anywhere, and 48 tokens at
    least: four equal words, a rule of dashes or a short table do not count. A text that ended by a stop token does not
    loop, since that stands last; nor does one that repeats itself with any change, or that got out of a loop.
    """
    ids = np.asarray(tokens)
    for period in range(1, LONGEST + 1):
        tail = max(COPIES * period, LEAST)
        if tail > len(ids):
            break
        if np.array_equal(ids[-tail + period :], ids[-tail:-period]):
            return True
    return False
