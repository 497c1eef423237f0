"""Writing a logit store: rows in any order and grouping, from several processes, safe to kill at any moment."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from ministral_jax.errors import UserError
from ministral_jax.teachers.store_format import (
    FINISHED,
    FORMAT,
    HASH_BYTES,
    RECORDING,
    SEALED,
    ArrayLayout,
    Description,
    Layout,
    Place,
    Split,
    StoreInfo,
    decode,
    encode,
    said,
    short,
)

Record = dict[str, Any]
Statistics = Callable[[dict[str, np.ndarray]], dict[str, Any]]


class Writer:
    """A store being written, from `open_for_writing`. Each shard has one process that writes and seals it.

    A file is replaced whole or not at all, and a row's hash is written after its data: a row whose hash is there is
    whole, and one that is not there is written again. The bytes of a shard depend on its rows alone, not on how many
    calls they came in.
    """

    def __init__(self, place: Place, description: Description, finished: Record | None):
        self.description = description
        self._place = place
        self._finished = finished
        if finished is None:
            arrays = description.arrays()
            hashes = {name: arrays.pop(name) for name in [f"{split}/hash" for split in description.splits]}
            self._arrays = place.open(arrays) | place.open(hashes, sparse=True)
            self._sealed = set(place.list(SEALED))

    def shards(self, split: str) -> int:
        """Number of shards of a split."""
        return self.description.shards(split)

    def rows_of(self, split: str, shard: int) -> range:
        """The rows of a shard."""
        return self.description.rows_of(split, shard)

    def done(self, split: str) -> np.ndarray:
        """Which rows are there, bool [N]."""
        if self._finished is not None:
            return np.ones(self.description.splits[split].rows, bool)
        with said(f"store {self._place.root}: the hashes of {split} cannot be read"):
            return self._arrays[f"{split}/hash"].read().result().any(axis=1)

    def write(
        self,
        split: str,
        rows: Sequence[int] | np.ndarray,
        hashes: Sequence[bytes],
        arrays: Mapping[str, np.ndarray],
    ) -> None:
        """Write `rows` [n] with their hashes (16 bytes each) and `arrays` [n, ..]; they are there when this returns.

        Each shard that they lie in is read and written once per array: few calls with many rows cost less.

        Raises:
            UserError: a file cannot be written. The rows that were there before still are.
        """
        self._check(split, rows, hashes, arrays)
        if not len(rows):
            return
        rows = np.asarray(rows, np.int64)
        for shard in np.unique(rows // self.description.splits[split].shard_rows):
            if (record := _record_file(split, shard)) in self._sealed:
                self._place.delete(record)
                self._sealed.remove(record)
        stored = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(rows), HASH_BYTES)
        what = f"{len(rows)} rows of {split} (the first is {rows[0]})"
        with said(f"store {self._place.root}: {what} could not be written (the same command goes on from there)"):
            self._commit({f"{split}/{name}": array for name, array in arrays.items()}, rows)
            self._commit({f"{split}/hash": stored}, rows)

    def put_head(self, part: np.ndarray, index: tuple[slice, ...] = (slice(None), slice(None))) -> None:
        """Write `part` of the teacher's output matrix [D', V] at `index`; several processes may, each its part.

        Raises:
            UserError: a file cannot be written.
        """
        if self._finished is None:
            with said(f"store {self._place.root}: the head could not be written"):
                self._commit({"head": part}, index)

    def seal_shard(self, split: str, shard: int, statistics: Statistics) -> Record:
        """The record of a shard whose rows are all there: {rows, bytes: {array: n}, sha256: {array: digest},
        statistics}, with `hash` among the arrays; `statistics` of the arrays [rows, ..] as they are read from disk.

        A shard that was sealed before, by whatever process, gives its record without being read.

        Raises:
            UserError: rows of it are missing, or a file of it cannot be read.
        """
        if self._finished is not None:
            return self._finished["shards"][split][shard]
        record_file = _record_file(split, shard)
        if (known := self._place.read(record_file)) is not None:
            return json.loads(known)
        where = f"store {self._place.root}, shard {shard} of {split}"
        rows = self.rows_of(split, shard)
        missing = int((~self.done(split)[rows.start : rows.stop]).sum())
        if missing:
            raise UserError(f"{where}: {missing} of its {len(rows)} rows are not there; record them before sealing it")
        with said(f"{where} is damaged; delete its files, its hashes first, and record it again"):
            reads = {
                name: self._arrays[f"{split}/{name}"][rows.start : rows.stop].read()
                for name in self.description.splits[split].arrays
            }
            arrays = {name: read.result() for name, read in reads.items()}
        files = {name: self._place.sha256(file) for name, file in self.description.shard_files(split, shard).items()}
        content = json.dumps(
            dict(
                rows=len(rows),
                bytes={name: size for name, (_, size) in files.items()},
                sha256={name: digest for name, (digest, _) in files.items()},
                statistics=statistics(arrays),
            )
        )
        self._place.write(record_file, content.encode())
        self._sealed.add(record_file)
        return json.loads(content)

    def finish(self, records: Mapping[str, Sequence[Record]]) -> None:
        """Write `store.json` with the records of every split's shards, in their order. One process does, when all have
        sealed their shards.

        Raises:
            UserError: a file of the store is missing or cannot be written.
        """
        if self._finished is None:
            self._place.sweep()
            self._place.write(FINISHED, encode(self._summary(records)))
        _clean(self._place)

    def _summary(self, records: Mapping[str, Sequence[Record]]) -> Record:
        wanted, totals = list(self.description.head_files()), {}
        for split, one in self.description.splits.items():
            sealed = records.get(split, ())
            if len(sealed) != self.shards(split) or sum(record["rows"] for record in sealed) != one.rows:
                raise ValueError(f"{len(sealed)} records of {split} for its {self.shards(split)} shards")
            names = (*one.arrays, "hash")
            totals[split] = dict(
                rows=one.rows, bytes={name: sum(record["bytes"][name] for record in sealed) for name in names}
            )
            wanted += [
                file for k in range(self.shards(split)) for file in self.description.shard_files(split, k).values()
            ]
        there = set(self._place.list())
        for file in wanted:
            if file not in there:
                raise UserError(
                    f"store {self._place.root} cannot be finished: {file} is missing; record its rows again"
                )
        small = [RECORDING, *(f"{array}/zarr.json" for array in self.description.arrays())]
        head = {file: self._place.sha256(file) for file in self.description.head_files()}
        return dict(
            format=FORMAT,
            status="finished",
            description=self.description.model_dump(mode="json"),
            metadata={file: self._place.sha256(file)[0] for file in small},
            shards={split: list(sealed) for split, sealed in records.items()},
            head={file: digest for file, (digest, _) in head.items()},
            totals=totals | ({"head": {"bytes": sum(size for _, size in head.values())}} if head else {}),
        )

    def _commit(self, parts: dict[str, np.ndarray], index: Any) -> None:
        """One write per file, in a transaction: without it a file might be replaced once per row."""
        together = ts.Transaction()
        copies = [self._arrays[name].with_transaction(together)[index].write(part).copy for name, part in parts.items()]
        for copy in copies:
            copy.result()
        together.commit_async().result()

    def _check(self, split: str, rows: Any, hashes: Sequence[bytes], arrays: Mapping[str, np.ndarray]) -> None:
        if self._finished is not None:
            raise ValueError(f"store {self._place.root} is finished: it takes no more rows")
        layout = self.description.splits[split].arrays
        found = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
        expected = {name: ((len(rows), *one.shape), one.dtype) for name, one in layout.items()}
        if found != expected:
            raise ValueError(f"arrays {found} given for {split}, whose layout is {expected}")
        if len(hashes) != len(rows) or any(len(one) != HASH_BYTES or not any(one) for one in hashes):
            raise ValueError(f"{len(rows)} hashes of {HASH_BYTES} bytes, not all zero, are needed")


def open_for_writing(
    root: str,
    info: StoreInfo,
    splits: Mapping[str, tuple[int, Mapping[str, ArrayLayout]]],
    shard_rows: Mapping[str, int],
    *,
    create: bool,
    head: ArrayLayout | None = None,
) -> Writer:
    """Create a store at `root`, a path or a URL, or go on with the one that is there; `splits` are {name: (rows, layout
    of one row)}, `shard_rows` how many of them a file holds, `head` the layout of the teacher's output matrix where one
    is stored.

    One process of a job calls it with `create`, the others without it, after that one. A finished store gives a Writer
    with nothing left to write.

    Raises:
        UserError: `root` holds a store of something else (says what differs), or files that are no store; or it cannot
            be written.
    """
    description = Description(
        info=info,
        splits={
            name: Split(
                rows=rows, shard_rows=shard_rows[name], arrays={array: _plain(one) for array, one in layout.items()}
            )
            for name, (rows, layout) in splits.items()
        },
        head=None if head is None else _plain(head),
    )
    place = Place(root)
    finished = place.read(FINISHED)
    if finished is not None:
        record = decode(finished, f"store {root}: {FINISHED}")
        _compare(place, Description.model_validate(record["description"]), description)
        if create:
            _clean(place)
        return Writer(place, description, record)
    started = place.read(RECORDING)
    if started is not None:
        before = decode(started, f"store {root}: {RECORDING}")
        _compare(place, Description.model_validate(before), description)
    elif not create:
        raise UserError(f"store {root} is not there: {RECORDING} is missing; do all processes see the same files?")
    elif place.list():
        raise UserError(f"{root} holds files, and no logit store: give the store a place of its own")
    if create:
        place.sweep()
        if started is None:
            place.write(RECORDING, encode(description.model_dump(mode="json")))
        place.open(description.arrays(), create=True)
    return Writer(place, description, None)


def _plain(layout: ArrayLayout) -> Layout:
    return Layout(shape=tuple(layout.shape), dtype=str(layout.dtype))


def _clean(place: Place) -> None:
    """Nothing that a finished store does not need."""
    place.delete(SEALED)
    place.sweep()


def _record_file(split: str, shard: int) -> str:
    return f"{SEALED}{split}/{shard}.json"


def _compare(place: Place, before: Description, now: Description) -> None:
    """Refuse to go on with a store of something else."""
    old, new = (_flat(one.model_dump(mode="json")) for one in (before, now))
    differs = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if not differs:
        return
    # what the rows were made from explains the rest: another codec has other arrays
    differs = [key for key in differs if key.startswith("info.")] or differs
    listed = [f"{key.removeprefix('info.')} {short(old.get(key))}, not {short(new.get(key))}" for key in differs[:4]]
    raise UserError(
        f"store {place.root} is of something else than is to be recorded: it has {'; '.join(listed)}; "
        "delete it or give the new one another place"
    )


def _flat(record: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(record, dict):
        return {prefix: record}
    return {
        key: value for name, one in record.items() for key, value in _flat(one, f"{prefix}.{name}".strip(".")).items()
    }
