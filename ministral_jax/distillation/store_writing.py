"""Writing a logit store: rows in any order and grouping, from several processes, safe to kill at any moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ministral_jax.distillation.store_format import ArrayLayout, StoreInfo

Record = dict[str, Any]


class Writer:
    """A store being written. Each shard has one process that writes and seals it; see `open_for_writing`."""

    def shards(self, split: str) -> int:
        """Number of shards of a split."""
        raise NotImplementedError

    def rows_of(self, split: str, shard: int) -> range:
        """The rows of a shard."""
        raise NotImplementedError

    def done(self, split: str) -> np.ndarray:
        """Which rows are there, bool [N]."""
        raise NotImplementedError

    def write(self, split: str, rows: Sequence[int], hashes: Sequence[bytes], arrays: Mapping[str, np.ndarray]) -> None:
        """Write `rows` [n] with their hashes (16 bytes each) and `arrays` [n, ..]; they are there when this returns."""
        raise NotImplementedError

    def put_head(self, part: np.ndarray, index: tuple[slice, ...] = (slice(None), slice(None))) -> None:
        """Write `part` of the teacher's output matrix [D', V] at `index`."""
        raise NotImplementedError

    def seal_shard(
        self, split: str, shard: int, statistics: Callable[[dict[str, np.ndarray]], dict[str, Any]]
    ) -> Record:
        """Record of a shard whose rows are all there: {rows, bytes: {array: n}, sha256: {array: hex}, statistics}."""
        raise NotImplementedError

    def finish(self, records: Mapping[str, Sequence[Record]]) -> None:
        """Write `store.json` with the records of every split's shards, in their order. By one process, after a barrier."""
        raise NotImplementedError


def open_for_writing(
    root: str,
    info: StoreInfo,
    splits: Mapping[str, tuple[int, Mapping[str, ArrayLayout]]],
    shard_rows: int,
    *,
    create: bool,
    head: ArrayLayout | None = None,
) -> Writer:
    """Create a store at `root`, a path or a URL, or go on with the one that is there. `splits` is {name: (rows, layout)}.

    One process of a job calls it with `create`, the others without it after a barrier. `head` is the layout of the
    teacher's output matrix, where one is stored. A finished store gives a Writer that has nothing left to write.

    Raises:
        UserError: `root` holds a store of something else (says which key differs), other files, or cannot be written.
    """
    raise NotImplementedError
