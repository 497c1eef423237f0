"""A logit store: what the teacher says about every row of a data recipe, on a local path or in an object store.

Rows are found by the content hash of their tokens, never by their place: batch size, order and number of hosts of the
training that reads them are free. They are written in any order and grouping, from several processes, and killing one
does no harm. `store_format` says what is on disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import tensorstore as ts

from ministral_jax.errors import UserError
from ministral_jax.teachers.store_format import (
    FINISHED,
    HASH_BYTES,
    RECORDING,
    SEALED,
    Arrays,
    Description,
    Files,
    Finished,
    ShardRecord,
    as_user_error,
    differences,
    reason,
)

Statistics = Callable[[Arrays], dict[str, Any]]
_WHOLE = (slice(None), slice(None))

# ---- reading --------------------------------------------------------------------------------------------------------


class HashIndex:
    """Place of every hash among N, found by bisection; 24 N bytes."""

    def __init__(self, hashes: np.ndarray):
        """`hashes` uint8 [N, 16]."""
        keys = _keys(hashes)
        order = np.argsort(keys, kind="stable")
        self._sorted, self._order = keys[order], np.append(order, -1)

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Places int64 [n] of `hashes` uint8 [n, 16], -1 where there is none, the first where there are several."""
        keys = _keys(hashes)
        start, stop = (np.searchsorted(self._sorted, keys, side) for side in ("left", "right"))
        return np.where(start < stop, self._order[start], -1)


def _keys(hashes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(hashes).view(f"S{HASH_BYTES}")[:, 0]


class Store:
    """A finished store at a path or URL. Serves several threads at once, and pickles: the copy opens the files again.

    `info` says what its rows were made from, `record` is all of `store.json`. Small files are verified when it is
    opened, the others as they are read.

    Raises:
        UserError: there is no store, it is not finished, or it has another format; or `store.json`, `recording.json`,
            the metadata of an array or a row's hash is damaged.
    """

    def __init__(self, root: str):
        self._files = files = Files(root)
        self.record = _finished(files)
        self.info, self._description = self.record.description.info, self.record.description
        for file, digest in self.record.metadata.items():
            if files.sha256(file)[0] != digest:
                raise UserError(f"store {self._files.root}: {file} is damaged: its sha256 is not what {FINISHED} says")
        self._arrays = files.open(self._description.metadata())
        self._index = {}
        for split in self._description.splits:
            with self._files.fault(f"the hashes of {split} are damaged or missing"):
                self._index[split] = HashIndex(self._arrays.pop(f"{split}/hash").read().result())

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self._files.root,)

    def read(self, split: str, hashes: Sequence[bytes]) -> Arrays:
        """Arrays [n, ..] of the rows of a split with these hashes, 16 bytes each, in their order.

        Raises:
            UserError: there is no such split, a hash is not there, or a file is damaged or missing (says which).
        """
        if split not in self._index:
            raise UserError(f"store {self._files.root} has no split {split!r}, it has {', '.join(self._index)}")
        rows = self._index[split].find(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BYTES))
        if (missing := np.flatnonzero(rows < 0)).size:
            raise UserError(
                f"store {self._files.root} has no row {hashes[missing[0]].hex()[:12]}… in {split} ({missing.size} of "
                f"{len(hashes)} are not there): it was recorded from other data, another packing or another tokenizer "
                "than are read here; record it again from these"
            )
        index = rows if len(rows) else slice(0, 0)  # TensorStore reads a chunk for an empty array of indices
        names = self._description.splits[split].arrays
        reads = {name: self._arrays[f"{split}/{name}"][index].read() for name in names}
        try:
            return {name: read.result() for name, read in reads.items()}
        except (ValueError, RuntimeError, OSError) as error:
            self._blame(split, rows, error)

    def _blame(self, split: str, rows: np.ndarray, error: Exception) -> NoReturn:
        """A read of many rows failed: which one is it?"""
        spec = self._description.splits[split]
        for row in rows.tolist():
            shard = row // spec.shard_rows
            for name in spec.arrays:
                file = self._description.shard_files(split, shard)[name]
                where = f"row {row} of {split} (shard {shard}, array {name}, file {file})"
                with self._files.fault(f"{where} is damaged or missing"):
                    self._arrays[f"{split}/{name}"][row].read().result()
        raise UserError(f"store {self._files.root}: {split} could not be read: {reason(error)}") from error

    def head(self, index: tuple[slice, ...] = _WHOLE) -> np.ndarray:
        """The part at `index` of the teacher's output matrix [D', V].

        Raises:
            UserError: none was stored, or a file of it is damaged or missing.
        """
        if "head" not in self._arrays:
            raise UserError(f"store {self._files.root} has no head: its codec {self.info.codec} needs none")
        with self._files.fault("the head is damaged or missing"):
            return self._arrays["head"][index].read().result()

    def check(self, teacher_digest: str, tokenizer_digest: str, data_digest: str, length: int, vocab: int) -> None:
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
        if other := differences(pairs):
            raise UserError(
                f"store {self._files.root} was recorded with another {next(iter(other))}: it has "
                f"{'; '.join(other.values())}; record it again with what is used here, or use what it was recorded with"
            )


def _finished(files: Files) -> Finished:
    if (record := files.load(Finished, FINISHED)) is not None:
        return record
    if files.read(RECORDING) is not None:
        raise UserError(f"store {files.root} is not finished: run the stage that records it again, it goes on")
    raise UserError(f"{files.root} is not a logit store: it has no {FINISHED}")


def verify(root: str) -> list[str]:
    """How the files of a finished store differ from what `store.json` says of them, one sentence each. Reads all.

    Raises:
        UserError: there is no finished store, or `store.json` is damaged.
    """
    files = Files(root)
    expected, there = _finished(files).digests(), files.list()
    problems = [f"{file} is missing" for file in sorted(expected.keys() - there)]
    problems += [f"{file} is not of this store" for file in sorted(there - expected.keys() - {FINISHED})]
    damaged = [file for file, digest in expected.items() if file in there and files.sha256(file)[0] != digest]
    return problems + [f"{file} is damaged: its sha256 is not what {FINISHED} says" for file in damaged]


# ---- writing --------------------------------------------------------------------------------------------------------


class Writer:
    """A store being written, from `open_for_writing`. Each shard has one process that writes and seals it.

    A file is replaced whole or not at all, and a row's hash is written after its data: a row whose hash is there is
    whole, and one that is not there is written again. The bytes of a shard depend on its rows alone, not on how many
    calls they came in.
    """

    def __init__(self, files: Files, description: Description, finished: Finished | None):
        self.description = description
        self._files, self._finished = files, finished
        self._arrays = files.open(description.metadata(), sparse=[f"{split}/hash" for split in description.splits])

    def done(self, split: str, rows: slice = slice(None)) -> np.ndarray:
        """Which rows are there, bool [N]."""
        if self._finished is not None:
            return np.ones(self.description.splits[split].rows, bool)[rows]
        with self._files.fault(f"the hashes of {split} cannot be read"):
            return self._arrays[f"{split}/hash"][rows].read().result().any(axis=1)

    def write(self, split: str, rows: Sequence[int] | np.ndarray, hashes: Sequence[bytes], arrays: Arrays) -> None:
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
            self._files.write(_record_file(split, shard), None)
        stored = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(rows), HASH_BYTES)
        what = f"{len(rows)} rows of {split} (the first is {rows[0]}) could not be written"
        with self._files.fault(f"{what} (the same command goes on from there)"):
            self._commit({f"{split}/{name}": array for name, array in arrays.items()}, rows)
            self._commit({f"{split}/hash": stored}, rows)

    def put_head(self, part: np.ndarray, index: tuple[slice, ...] = _WHOLE) -> None:
        """Write `part` of the teacher's output matrix [D', V] at `index`; several processes may, each its part."""
        if self._finished is None:
            with self._files.fault("the head could not be written"):
                self._commit({"head": part}, index)

    def seal_shard(self, split: str, shard: int, statistics: Statistics) -> ShardRecord:
        """The record of a shard whose rows are all there, with `statistics` of the arrays [rows, ..] as they are read
        from disk. A shard that was sealed before, by whatever process, gives its record without being read.

        Raises:
            UserError: rows of it are missing, or a file of it cannot be read.
        """
        if self._finished is not None:
            return self._finished.shards[split][shard]
        record_file = _record_file(split, shard)
        if (known := self._files.read(record_file)) is not None:
            return ShardRecord.model_validate(json.loads(known))
        spec, where = self.description.splits[split], f"store {self._files.root}, shard {shard} of {split}"
        rows = spec.rows_of(shard)
        part = slice(rows.start, rows.stop)
        if missing := int((~self.done(split, part)).sum()):
            raise UserError(f"{where}: {missing} of its {len(rows)} rows are not there; record them before sealing it")
        with as_user_error(f"{where} is damaged; delete its files, its hashes first, and record it again"):
            reads = {name: self._arrays[f"{split}/{name}"][part].read() for name in spec.arrays}
            arrays = {name: read.result() for name, read in reads.items()}
        found = {name: self._files.sha256(file) for name, file in self.description.shard_files(split, shard).items()}
        record = ShardRecord(
            rows=len(rows),
            bytes={name: size for name, (_, size) in found.items()},
            sha256={name: digest for name, (digest, _) in found.items()},
            statistics=statistics(arrays),
        )
        self._files.write(record_file, json.dumps(record.model_dump()).encode())
        return record

    def finish(self, records: Mapping[str, Sequence[ShardRecord]]) -> None:
        """Write `store.json` with the records of every split's shards, in their order. One process does, when all have
        sealed their shards.

        Raises:
            UserError: a file of the store is missing or cannot be written.
        """
        if self._finished is None:
            _clean(self._files)
            finished = self._summed(records)
            if lost := sorted(finished.digests().keys() - self._files.list()):
                where = f"store {self._files.root} cannot be finished"
                raise UserError(f"{where}: {lost[0]} is missing; record its rows again")
            self._files.save(FINISHED, finished)
        _clean(self._files, sealed=True)

    def _summed(self, records: Mapping[str, Sequence[ShardRecord]]) -> Finished:
        totals: dict[str, Any] = {}
        for split, spec in self.description.splits.items():
            if sum(record.rows for record in records[split]) != spec.rows:
                raise ValueError(f"{len(records[split])} records of {split} for its {spec.shards} shards")
            names = (*spec.arrays, "hash")
            size = {name: sum(record.bytes[name] for record in records[split]) for name in names}
            totals[split] = {"rows": spec.rows, "bytes": size}
        small = [RECORDING, *(f"{array}/zarr.json" for array in self.description.metadata())]
        head = {file: self._files.sha256(file) for file in self.description.head_files()}
        return Finished(
            description=self.description,
            metadata={file: self._files.sha256(file)[0] for file in small},
            shards={split: tuple(sealed) for split, sealed in records.items()},
            head={file: digest for file, (digest, _) in head.items()},
            totals=totals | ({"head": {"bytes": sum(size for _, size in head.values())}} if head else {}),
        )

    def _commit(self, parts: Arrays, index: Any) -> None:
        """One write per file, in a transaction: without it a file might be replaced once per row."""
        with ts.Transaction() as together:
            for name, part in parts.items():
                self._arrays[name].with_transaction(together)[index] = part

    def _check(self, split: str, rows: Any, hashes: Sequence[bytes], arrays: Arrays) -> None:
        if self._finished is not None:
            raise ValueError(f"store {self._files.root} is finished: it takes no more rows")
        found = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
        layout = self.description.splits[split].arrays
        expected = {name: ((len(rows), *one.shape), one.dtype) for name, one in layout.items()}
        if found != expected:
            raise ValueError(f"arrays {found} given for {split}, whose layout is {expected}")
        if len(hashes) != len(rows) or any(len(one) != HASH_BYTES or not any(one) for one in hashes):
            raise ValueError(f"{len(rows)} hashes of {HASH_BYTES} bytes, not all zero, are needed")


def open_for_writing(root: str, description: Description, *, create: bool) -> Writer:
    """Create a store at `root`, a path or a URL, or go on with the one that is there.

    One process of a job calls it with `create`, the others without it, after that one. A finished store gives a Writer
    with nothing left to write.

    Raises:
        UserError: `root` holds a store of something else (says what differs), or files that are no store; or it cannot
            be written.
    """
    files = Files(root)
    if (finished := files.load(Finished, FINISHED)) is not None:
        _compare(files, finished.description, description)
        if create:
            _clean(files, sealed=True)
        return Writer(files, description, finished)
    if (started := files.load(Description, RECORDING)) is not None:
        _compare(files, started, description)
    elif not create:
        raise UserError(f"store {root} is not there: {RECORDING} is missing; do all processes see the same files?")
    elif files.list():
        raise UserError(f"{root} holds files, and no logit store: give the store a place of its own")
    if create:
        _clean(files)
        if started is None:
            files.save(RECORDING, description)
        files.open(description.metadata(), create=True)
    return Writer(files, description, None)


def _clean(files: Files, sealed: bool = False) -> None:
    """Delete what a killed process left of a file that it was writing, and what a finished store does not need.

    TensorStore writes `<file>.__lock`, never lists it and renames it to `<file>`; object stores have no such thing.
    """
    if sealed:
        with files.fault(f"{SEALED} could not be deleted"):
            (files.kvstore / SEALED).delete_range(ts.KvStore.KeyRange()).result()
    if (local := files.local) is not None:
        for left in local.rglob("*.__lock"):
            left.unlink(missing_ok=True)
        if sealed:
            shutil.rmtree(local / SEALED, ignore_errors=True)


def _record_file(split: str, shard: int) -> str:
    return f"{SEALED}{split}/{shard}.json"


def _compare(files: Files, before: Description, now: Description) -> None:
    """Refuse to go on with a store of something else."""
    old, new = (_flat(one.model_dump(mode="json")) for one in (before, now))
    other = differences({key: (old.get(key), new.get(key)) for key in {**old, **new}})
    # what the rows were made from explains the rest: another codec has other arrays
    other = {key: text.removeprefix("info.") for key, text in other.items() if key.startswith("info.")} or other
    if other:
        raise UserError(
            f"store {files.root} is of something else than is to be recorded: it has "
            f"{'; '.join(list(other.values())[:4])}; delete it or give the new one another place"
        )


def _flat(record: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(record, dict):
        return {prefix: record}
    parts = [_flat(value, f"{prefix}.{name}".strip(".")) for name, value in record.items()]
    return {key: value for part in parts for key, value in part.items()}
