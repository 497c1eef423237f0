"""What a logit store looks like on disk: its description, the metadata of its arrays, and files at a path or a URL.

    recording.json              what the store is to hold, written first: a Description
    <split>/<array>/            zarr3 array [N, ..]: a shard (file) holds `shard_rows` rows, an inner chunk one row
    <split>/hash/               zarr3 array [N, 16] uint8: content hash of each row, all zero where the row is not there
    head/                       zarr3 array [D', V]: the teacher's output matrix, where the codec needs it
    recording/<split>/<n>.json  records of sealed shards, until the store is finished
    store.json                  the description and the records of all shards, written last: its presence means finished

Arrays are zarr3 (https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html), cut by `sharding_indexed`. Every
chunk and index carries a crc32c, `store.json` the SHA-256 of every file, and both JSON files one of themselves.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import tensorstore as ts

from ministral_jax.errors import UserError
from ministral_jax.settings import Frozen

FORMAT = "ministral-jax logit store 1"
HASH_BYTES = 16
RECORDING, FINISHED, SEALED = "recording.json", "store.json", "recording/"
_HEAD_CHUNK = (1024, 4096)
_CRC = {"name": "crc32c"}
# A row is read once an epoch: a cache would only cost memory.
_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 0}})


class ArrayLayout(Protocol):
    """Shape and dtype of one row of an array, or of the head."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...


class Teacher(Frozen):
    """The stage that the teacher's parameters come from, and their digest."""

    stage: str
    digest: str


class StoreInfo(Frozen):
    """What the rows of a store were made from: with equal info the same row has the same bytes.

    `length` is T, `vocab` V, `width` D' of the teacher's states; `forced` are the ids that every token has an entry
    for; `dtype` is what the teacher computed in.
    """

    codec: dict[str, Any]
    teacher: Teacher
    tokenizer_digest: str
    data_digest: str
    length: int
    vocab: int
    width: int
    forced: tuple[int, ...] = ()
    seed: int
    dtype: str


class Layout(Frozen):
    """An `ArrayLayout` as the JSON files say it."""

    shape: tuple[int, ...]
    dtype: str


class Split(Frozen):
    """N rows, how many of them a file holds, and what one row of each array is."""

    rows: int
    shard_rows: int
    arrays: dict[str, Layout]


class Description(Frozen):
    """Everything about a store that is known before its first row."""

    format: str = FORMAT
    info: StoreInfo
    splits: dict[str, Split]
    head: Layout | None = None

    def shards(self, split: str) -> int:
        return -(-self.splits[split].rows // self.splits[split].shard_rows)

    def rows_of(self, split: str, shard: int) -> range:
        rows, of_shard = self.splits[split].rows, self.splits[split].shard_rows
        return range(shard * of_shard, min((shard + 1) * of_shard, rows))

    def arrays(self) -> dict[str, dict[str, Any]]:
        """zarr3 metadata of every array, by its directory."""
        found = {}
        for name, split in self.splits.items():
            for array, (shape, dtype) in ((array, (one.shape, one.dtype)) for array, one in split.arrays.items()):
                found[f"{name}/{array}"] = _sharded(split.rows, shape, dtype, split.shard_rows)
            hashes = (split.shard_rows, HASH_BYTES)
            found[f"{name}/hash"] = _zarr((split.rows, HASH_BYTES), "uint8", hashes, [_endian("uint8"), _CRC])
        if self.head is not None:
            chunk = tuple(min(size, most) for size, most in zip(self.head.shape, _HEAD_CHUNK, strict=True))
            found["head"] = _zarr(self.head.shape, self.head.dtype, chunk, _compressed(self.head.dtype))
        return found

    def shard_files(self, split: str, shard: int) -> dict[str, str]:
        """The file of a shard by array, `hash` among them."""
        arrays = self.splits[split].arrays
        files = {array: f"{split}/{array}/c/{shard}" + "/0" * len(one.shape) for array, one in arrays.items()}
        return files | {"hash": f"{split}/hash/c/{shard}/0"}

    def head_files(self) -> list[str]:
        """The files of the head's chunks."""
        if self.head is None:
            return []
        down, across = (-(-size // min(size, most)) for size, most in zip(self.head.shape, _HEAD_CHUNK, strict=True))
        return [f"head/c/{i}/{j}" for i in range(down) for j in range(across)]


def itemsize(dtype: str) -> int:
    return ts.dtype(dtype).numpy_dtype.itemsize


def row_bytes(layout: ArrayLayout) -> int:
    """Of one row, before compression."""
    return math.prod(layout.shape) * itemsize(layout.dtype)


def _zarr(shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...], codecs: list[dict[str, Any]]) -> dict[str, Any]:
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    return {"shape": shape, "data_type": dtype, "fill_value": 0, "chunk_grid": grid, "codecs": codecs}


def _sharded(rows: int, shape: tuple[int, ...], dtype: str, shard_rows: int) -> dict[str, Any]:
    row = {
        "chunk_shape": (1, *shape),
        "codecs": _compressed(dtype),
        "index_codecs": [_endian("uint64"), _CRC],
        "index_location": "end",
    }
    shard = {"name": "sharding_indexed", "configuration": row}
    return _zarr((rows, *shape), dtype, (shard_rows, *shape), [shard])


def _compressed(dtype: str) -> list[dict[str, Any]]:
    """What packs each kind best: integers leave their high bits unused, floats repeat their sign and exponent."""
    shuffle = "noshuffle" if itemsize(dtype) == 1 else "bitshuffle" if dtype.startswith("uint") else "shuffle"
    blosc = {"cname": "zstd", "clevel": 3, "shuffle": shuffle, "typesize": itemsize(dtype), "blocksize": 0}
    return [_endian(dtype), {"name": "blosc", "configuration": blosc}, _CRC]


def _endian(dtype: str) -> dict[str, Any]:
    return {"name": "bytes"} | ({"configuration": {"endian": "little"}} if itemsize(dtype) > 1 else {})


class Place:
    """The files of a store at a local path or at a URL that TensorStore knows (file://, gs://, s3://)."""

    def __init__(self, root: str):
        self.root = root.rstrip("/")
        url = "://" in root
        with said(f"{root} is not a place for a logit store"):
            self._files = ts.KvStore.open(
                f"{self.root}/" if url else {"driver": "file", "path": f"{Path(root).absolute()}/"}
            ).result()
        spec = self._files.spec().to_json()
        self._local = Path(spec["path"]) if spec["driver"] == "file" else None

    def read(self, file: str) -> bytes | None:
        with said(f"store {self.root}: {file} cannot be read"):
            found = self._files.read(file).result()
            return found.value if found.state == "value" else None

    def write(self, file: str, content: bytes) -> None:
        """Replace a file at once."""
        with said(f"store {self.root}: {file} could not be written"):
            self._files.write(file, content).result()

    def list(self, prefix: str = "") -> list[str]:
        with said(f"store {self.root}: its files cannot be listed"):
            found = self._files.list(_beginning_with(prefix)).result()
        return sorted(key.decode() for key in found)

    def delete(self, prefix: str) -> None:
        """All files whose names begin with `prefix`."""
        with said(f"store {self.root}: {prefix} could not be deleted"):
            self._files.delete_range(_beginning_with(prefix)).result()
        if self._local is not None and prefix.endswith("/"):
            shutil.rmtree(self._local / prefix, ignore_errors=True)

    def sweep(self) -> None:
        """Delete what a killed process left of a file that it was writing. TensorStore writes `<file>.__lock`, never
        lists it and renames it to `<file>`; object stores have no such thing."""
        if self._local is not None:
            for left in self._local.rglob("*.__lock"):
                left.unlink(missing_ok=True)

    def sha256(self, file: str) -> tuple[str, int]:
        """Digest and size of a file.

        Raises:
            UserError: it is missing.
        """
        content = self.read(file)
        if content is None:
            raise UserError(f"store {self.root}: {file} is missing")
        return hashlib.sha256(content).hexdigest(), len(content)

    def open(self, arrays: dict[str, dict[str, Any]], *, create: bool = False, sparse: bool = False) -> dict[str, Any]:
        """TensorStore handles of arrays (metadata by directory). Chunks that are missing read as zeros where `sparse`,
        and are an error elsewhere: then a chunk of nothing but zeros is written like any other."""
        handles, open_spec = {}, {"fill_missing_data_reads": sparse, "store_data_equal_to_fill_value": True}
        for directory, metadata in arrays.items():
            kvstore = (self._files / f"{directory}/").spec().to_json()
            spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata} | open_spec
            handles[directory] = ts.open(spec, open=True, create=create, context=_CONTEXT)
        for directory, future in handles.items():
            with said(f"store {self.root}: {directory}/zarr.json does not serve"):
                handles[directory] = future.result()
        return handles


def _beginning_with(prefix: str) -> Any:
    """Keys that begin with `prefix`, whose last character is ASCII."""
    return ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else "")


@contextmanager
def said(sentence: str) -> Iterator[None]:
    """Errors of TensorStore as a UserError that begins with `sentence`."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, RuntimeError, OSError, LookupError, NotImplementedError) as error:
        raise UserError(f"{sentence}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """TensorStore's message in one line, without the specification that it ends with."""
    return " ".join(re.sub(r" \[[a-z_ ]+='.*", "", str(error), flags=re.DOTALL).split())


def encode(record: dict[str, Any]) -> bytes:
    """JSON with a digest of itself."""
    return _text(record | {"sha256": _own_digest(record)})


def decode(content: bytes, where: str) -> dict[str, Any]:
    """The record that `encode` wrote.

    Raises:
        UserError: a byte of it differs, or it has another format; begins with `where`.
    """
    try:
        record = json.loads(content)
        found = record["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where} is damaged: it is not the JSON of a logit store") from error
    if found != FORMAT:
        raise UserError(f"{where} has the format {found!r}, this version reads {FORMAT!r}")
    digest = record.pop("sha256", None)
    if digest != _own_digest(record) or content != encode(record):
        raise UserError(f"{where} is damaged: its content is not what its sha256 says")
    return record


def _text(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, sort_keys=True, indent=1) + "\n").encode()


def _own_digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(_text(record)).hexdigest()


def short(value: Any) -> str:
    """A value for a message; digests by their beginning."""
    text = str(value)
    return f"{text[:12]}…" if re.fullmatch("[0-9a-f]{32,}", text) else repr(value)
