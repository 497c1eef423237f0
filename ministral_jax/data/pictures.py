"""How large the pictures of packed rows are: what every process knows of the rows that others read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load, save

from ministral_jax.data.documents import Documents
from ministral_jax.data.packing import Piece


class Pictures(NamedTuple):
    """Of row r of a split: merged tokens `[I]` of its pictures in order, `tokens[starts[r]:starts[r + 1]]`."""

    starts: np.ndarray
    tokens: np.ndarray

    def of(self, row: int) -> list[int]:
        """Merged tokens of each picture of a row."""
        return self.tokens[self.starts[row] : self.starts[row + 1]].tolist()


def picture_sizes(pieces: Sequence[Piece], sources: Sequence[Documents]) -> np.ndarray:
    """Merged tokens of each picture of a row of these pieces, in order; int32 `[I]`."""
    found = [np.zeros(0, np.int32)]
    for source, d in ((sources[piece.source], piece.document) for piece in pieces):
        found.append(source.grids[source.picture_starts[d] : source.picture_starts[d + 1]].prod(axis=1))
    return np.concatenate(found).astype(np.int32)


def write_pictures(directory: Path, split: str, rows: Sequence[np.ndarray]) -> None:
    """Keep beside the packed rows what `read_pictures` gives."""
    counts = np.array([len(row) for row in rows], np.int64)
    tokens = np.concatenate([np.zeros(0, np.int32), *rows]).astype(np.int32)
    table = {"starts": np.append(0, np.cumsum(counts)), "tokens": tokens}
    (directory / f"{split}.pictures").write_bytes(save(table))


def read_pictures(directory: Path, split: str) -> Pictures:
    """Of all rows of a split."""
    return Pictures(**load((directory / f"{split}.pictures").read_bytes()))
