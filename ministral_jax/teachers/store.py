"""A logit store: what the teacher says about every row of a data recipe, on a local path or in an object store.

Rows are found by the content hash of their tokens, never by their place: batch size, order and number of hosts of
the training that reads them are free. `store_format` says what is on disk; `store_writing` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from ministral_jax.errors import UserError
from ministral_jax.teachers.store_format import (
    FINISHED,
    HASH_BYTES,
    RECORDING,
    Description,
    Place,
    StoreInfo,
    Teacher,
    decode,
    reason,
    said,
    short,
)
from ministral_jax.teachers.store_writing import Record, Writer, open_for_writing

__all__ = [
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


class HashIndex:
    """Place of every hash among N, found by bisection; 24 N bytes."""

    def __init__(self, hashes: np.ndarray):
        """`hashes` uint8 [N, 16]."""
        words = np.ascontiguousarray(hashes).view(np.uint64)
        order = np.lexsort((words[:, 1], words[:, 0]))
        self._order, self._first, self._second = order, words[order, 0], words[order, 1]

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Places int64 [n] of `hashes` uint8 [n, 16], -1 where there is none, any of them where there are several."""
        words = np.ascontiguousarray(hashes).view(np.uint64)
        starts = np.searchsorted(self._first, words[:, 0], "left")
        stops = np.searchsorted(self._first, words[:, 0], "right")
        found = np.full(len(words), -1, np.int64)
        for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            at = start + np.searchsorted(self._second[start:stop], words[i, 1])
            if at < stop and self._second[at] == words[i, 1]:
                found[i] = self._order[at]
        return found


class SplitReader:
    """Rows of one split by hash. Serves several threads at once, and pickles: the copy opens the files again."""

    def __init__(self, root: str, split: str, description: Description):
        self._place, self._split, self._description = Place(root), split, description
        prefix = f"{split}/"
        arrays = {name: one for name, one in description.arrays().items() if name.startswith(prefix)}
        self._arrays = {name.removeprefix(prefix): one for name, one in self._place.open(arrays).items()}
        with said(f"store {root}: the hashes of {split} are damaged or missing"):
            self._index = HashIndex(self._arrays.pop("hash").read().result())

    def __reduce__(self) -> tuple[Any, ...]:
        return SplitReader, (self._place.root, self._split, self._description)

    def find(self, hashes: Sequence[bytes]) -> np.ndarray:
        """Rows int64 [n] of `hashes`, 16 bytes each.

        Raises:
            UserError: one of them is not there.
        """
        wanted = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), HASH_BYTES)
        rows = self._index.find(wanted)
        if (missing := np.flatnonzero(rows < 0)).size:
            raise UserError(
                f"store {self._place.root} has no row {hashes[missing[0]].hex()[:12]}… in {self._split} "
                f"({missing.size} of {len(hashes)} are not there): it was recorded from other data, another packing or "
                "another tokenizer than are read here; record it again from these"
            )
        return rows

    def read(self, hashes: Sequence[bytes]) -> dict[str, np.ndarray]:
        """Arrays [n, ..] of the rows with these hashes, in their order.

        Raises:
            UserError: a hash is not there, or a file is damaged or missing (says which).
        """
        rows = self.find(hashes)
        index = rows if len(rows) else slice(0, 0)  # TensorStore reads a chunk for an empty array of indices
        reads = {name: array[index].read() for name, array in self._arrays.items()}
        try:
            return {name: read.result() for name, read in reads.items()}
        except (ValueError, RuntimeError, OSError) as error:
            self._blame(rows, error)

    def _blame(self, rows: np.ndarray, error: Exception) -> NoReturn:
        """A read of many rows failed: which one is it?"""
        for row in rows.tolist():
            shard = row // self._description.splits[self._split].shard_rows
            for name, file in self._description.shard_files(self._split, shard).items():
                if name != "hash":
                    where = f"row {row} of {self._split} (shard {shard}, array {name}, file {file})"
                    with said(f"store {self._place.root}: {where} is damaged or missing"):
                        self._arrays[name][row].read().result()
        raise UserError(f"store {self._place.root}: {self._split} could not be read: {reason(error)}") from error


class Reader:
    """A finished store, from `open_store`.

    `info` says what its rows were made from, `totals` {split: {rows, bytes: {array: n}}, head: {bytes}} their sizes on
    disk.
    """

    def __init__(self, place: Place, record: Record):
        self._place, self._record = place, record
        self.description = Description.model_validate(record["description"])
        self.info: StoreInfo = self.description.info
        self.totals: dict[str, Any] = record["totals"]

    def shards(self, split: str) -> list[Record]:
        """Records of a split's shards, as `Writer.seal_shard` gave them."""
        return self._record["shards"][self._known(split)]

    def split(self, name: str) -> SplitReader:
        """Raises UserError: there is no such split, or its hashes are damaged or missing."""
        return SplitReader(self._place.root, self._known(name), self.description)

    def head(self, index: tuple[slice, ...] = (slice(None), slice(None))) -> np.ndarray:
        """The part at `index` of the teacher's output matrix [D', V].

        Raises:
            UserError: none was stored, or a file of it is damaged or missing.
        """
        if self.description.head is None:
            raise UserError(f"store {self._place.root} has no head: its codec {self.info.codec} needs none")
        array = self._place.open({"head": self.description.arrays()["head"]})["head"]
        with said(f"store {self._place.root}: the head is damaged or missing"):
            return array[index].read().result()

    def check(
        self,
        *,
        teacher_digest: str | None = None,
        tokenizer_digest: str | None = None,
        data_digest: str | None = None,
        length: int | None = None,
        vocab: int | None = None,
    ) -> None:
        """Refuse a store that was recorded from something else than what is given.

        Raises:
            UserError: says what differs, and what to do.
        """
        info = self.info
        pairs = {
            f"teacher (stage {info.teacher.stage})": (info.teacher.digest, teacher_digest),
            "tokenizer": (info.tokenizer_digest, tokenizer_digest),
            "set or packing of data": (info.data_digest, data_digest),
            "length of a row": (info.length, length),
            "vocabulary": (info.vocab, vocab),
        }
        other = {what: pair for what, pair in pairs.items() if pair[1] is not None and pair[0] != pair[1]}
        if other:
            listed = "; ".join(f"{what} {short(old)}, not {short(new)}" for what, (old, new) in other.items())
            raise UserError(
                f"store {self._place.root} was recorded with another {next(iter(other))}: it has {listed}; "
                "record it again with what is used here, or use what it was recorded with"
            )

    def _known(self, split: str) -> str:
        if split not in self.description.splits:
            raise UserError(
                f"store {self._place.root} has no split {split!r}, it has {', '.join(self.description.splits)}"
            )
        return split


def open_store(root: str) -> Reader:
    """Open a finished store at a path or URL. Small files are verified here, the others as they are read.

    Raises:
        UserError: there is no store, it is not finished, or it has another format; or `store.json`, `recording.json` or
            the metadata of an array is damaged.
    """
    place = Place(root)
    record = _finished(place)
    for file, digest in record["metadata"].items():
        if place.sha256(file)[0] != digest:
            raise UserError(f"store {root}: {file} is damaged: its sha256 is not what {FINISHED} says")
    return Reader(place, record)


def _finished(place: Place) -> Record:
    """Content of `store.json`."""
    content = place.read(FINISHED)
    if content is None and place.read(RECORDING) is not None:
        raise UserError(f"store {place.root} is not finished: run the stage that records it again, it goes on")
    if content is None:
        raise UserError(f"{place.root} is not a logit store: it has no {FINISHED}")
    return decode(content, f"store {place.root}: {FINISHED}")


def verify(root: str) -> list[str]:
    """How the files of a finished store differ from what `store.json` says of them, one sentence each. Reads all.

    Raises:
        UserError: there is no finished store, or `store.json` is damaged.
    """
    place = Place(root)
    record = _finished(place)
    description = Description.model_validate(record["description"])
    expected = record["metadata"] | record["head"]
    for split, sealed in record["shards"].items():
        for shard, one in enumerate(sealed):
            files = description.shard_files(split, shard)
            expected |= {file: one["sha256"][name] for name, file in files.items()}
    there = set(place.list())
    problems = [f"{file} is missing" for file in sorted(expected.keys() - there)]
    problems += [f"{file} is not of this store" for file in sorted(there - expected.keys() - {FINISHED})]
    damaged = [file for file, digest in expected.items() if file in there and place.sha256(file)[0] != digest]
    return problems + [f"{file} is damaged: its sha256 is not what {FINISHED} says" for file in damaged]
