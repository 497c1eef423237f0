"""A batch of rows with and without pictures."""

import numpy as np
from model_cases import IMG, VISION

from ministral_jax.data.batch import Batch, images_of_rows, one_per_row
from ministral_jax.data.images import to_patches

GRIDS = [[(2, 3)], [], [(1, 1), (3, 2)], [(4, 4)], [], [(1, 2)], [(2, 2)], [(1, 1)]]
"""Rows and columns, in merged tokens, of the pictures of each row."""


def pictures(grids: list[tuple[int, int]], seed: int) -> list[np.ndarray]:
    random, side = np.random.default_rng(seed), VISION.stride
    return [random.integers(0, 256, (side * y, side * x, 3)).astype(np.uint8) for y, x in grids]


def mixed() -> Batch:
    shown = [to_patches(pictures(grids, n), VISION) if grids else None for n, grids in enumerate(GRIDS)]
    tokens = [[1, *[IMG] * (0 if one is None else int(one.grids.prod(axis=1).sum())), *range(20, 24)] for one in shown]
    batch = one_per_row(tokens)
    return batch | images_of_rows(shown, batch["tokens"] == IMG)
