"""When a text goes round in circles."""

import numpy as np

from ministral_jax.alignment.loops import is_looping


def test_loops():
    random = np.random.RandomState(0).randint(0, 1000, 3000).tolist()
    block = random[:100]
    loops = [[7] * 48, [1, 2] * 24, random + [7] * 48, random + block * 4, random + (block * 5)[:437], block * 30]
    fine = [
        [],
        [7] * 47,
        random,
        random + block * 3,
        [7] * 200 + [2],  # ended by a stop token
        block * 10 + random,  # got out of it
        [t for n in range(200) for t in (5, 6, n)],  # a list with numbers
        random + random[:600] * 4,  # longer than the longest period
        list(range(60)),
    ]
    assert [is_looping(tokens) for tokens in loops] == [True] * len(loops)
    assert [is_looping(tokens) for tokens in fine] == [False] * len(fine)
