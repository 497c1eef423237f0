"""A logit store: what the teacher says about every row of a data recipe, on a local path or an object store.

Rows are found by the content hash of their tokens, never by their place, so that batch size, order and number of hosts
of the training that reads them are free. `store_format` says what is on disk, `store_writing` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ministral_jax.distillation.store_format import FORMAT, StoreInfo, Teacher
from ministral_jax.distillation.store_writing import Record, Writer, open_for_writing

__all__ = [
    "FORMAT",
    "Reader",
    "Record",
    "SplitReader",
    "StoreInfo",
    "Teacher",
    "Writer",
    "open_for_writing",
    "open_store",
    "verify",
]


class SplitReader:
    """Rows of one split by hash. Serves several threads, and pickles (the copy opens the files again)."""

    def read(self, hashes: Sequence[bytes]) -> dict[str, np.ndarray]:
        """Arrays [n, ..] of the rows with these hashes, in their order."""
        raise NotImplementedError


class Reader:
    """A finished store."""

    info: StoreInfo
    totals: dict[str, Any]  # {split: {"rows": N, "bytes": {array: n}}}

    def shards(self, split: str) -> list[Record]:
        """Records of a split's shards."""
        raise NotImplementedError

    def split(self, name: str) -> SplitReader:
        raise NotImplementedError

    def head(self, index: tuple[slice, ...] = (slice(None), slice(None))) -> np.ndarray:
        """The part of the teacher's output matrix [D', V] at `index`."""
        raise NotImplementedError

    def check(
        self,
        *,
        teacher_digest: str | None = None,
        tokenizer_digest: str | None = None,
        data_digest: str | None = None,
        length: int | None = None,
        vocab: int | None = None,
    ) -> None:
        """Refuse a store that was recorded from something else than what is given."""
        raise NotImplementedError


def open_store(root: str) -> Reader:
    raise NotImplementedError


def verify(root: str) -> list[str]:
    """What differs between the files of a finished store and what `store.json` says of them; nothing when it is whole."""
    raise NotImplementedError
