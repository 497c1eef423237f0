"""What a logit store looks like on disk, and its files at a path or a URL.

    recording.json              a `Description`: what the store is to hold, written first
    <split>/<array>/            zarr3 array [N, ..]: a shard (file) holds `shard_rows` rows, an inner chunk one row
    <split>/hash/               zarr3 array [N, 16] uint8: content hash of each row, all zero where the row is not there
    head/                       zarr3 array [D', V]: the teacher's output matrix, where the codec needs it
    recording/<split>/<n>.json  the `ShardRecord` of each sealed shard, until the store is finished
    store.json                  `Finished`, written last: its presence means finished

Arrays are zarr3 (https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html), cut by `sharding_indexed`. Every
chunk and index carries a crc32c, `store.json` the SHA-256 of every file, and both JSON files one of themselves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import tensorstore as ts

from ministral_jax.errors import UserError
from ministral_jax.settings import Frozen

FORMAT = "ministral-jax logit store 1"
HASH_BYTES = 16
RECORDING, FINISHED, SEALED = "recording.json", "store.json", "recording/"
Arrays = dict[str, np.ndarray]
_HEAD_CHUNK = (1024, 4096)
_CRC = {"name": "crc32c"}
# A row is read once an epoch: a cache would only cost memory.
_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 0}})


class ArraySpec(Frozen):
    """Shape and dtype of one row of an array, or of the head."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        return ts.dtype(self.dtype).numpy_dtype.itemsize


class SplitSpec(Frozen):
    """N rows, how many of them a file holds, and what one row of each array is."""

    rows: int
    shard_rows: int
    arrays: dict[str, ArraySpec]

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        return range(self.rows)[shard * self.shard_rows : (shard + 1) * self.shard_rows]


def split_spec(rows: int, shard_rows: int, arrays: dict[str, ArraySpec]) -> SplitSpec:
    """With fewer rows in a file where it would hold more than 2^29 bytes before compression: each batch that adds to a
    file writes it anew."""
    largest = max(math.prod(one.shape) * one.itemsize for one in arrays.values())
    return SplitSpec(rows=rows, shard_rows=min(shard_rows, max(2**29 // largest, 1)), arrays=arrays)


class TeacherIdentity(Frozen):
    """The stage that the teacher's parameters come from, and their digest."""

    stage: str
    digest: str


class StoreInfo(Frozen):
    """What the rows of a store were made from: with equal info the same row has the same bytes.

    `length` is T, `vocab` V, `width` D' of the teacher's states; `forced` are the ids that every token has an entry
    for; `dtype` is what the teacher computed in.
    """

    codec: dict[str, Any]
    teacher: TeacherIdentity
    tokenizer_digest: str
    data_digest: str
    length: int
    vocab: int
    width: int
    forced: tuple[int, ...] = ()
    seed: int
    dtype: str


class Description(Frozen):
    """`recording.json`: everything about a store that is known before its first row."""

    format: str = FORMAT
    info: StoreInfo
    splits: dict[str, SplitSpec]
    head: ArraySpec | None = None

    def metadata(self) -> dict[str, dict[str, Any]]:
        """zarr3 metadata of every array, by its directory. TensorStore fills in what it does not say: little-endian
        bytes, and a shard's index at its end, with a crc32c."""
        found = {}
        for name, split in self.splits.items():
            for array, one in split.arrays.items():
                row = {"chunk_shape": (1, *one.shape), "codecs": [_compressed(one), _CRC]}
                codec = {"name": "sharding_indexed", "configuration": row}
                chunk = (split.shard_rows, *one.shape)
                found[f"{name}/{array}"] = _zarr((split.rows, *one.shape), chunk, one.dtype, codec)
            found[f"{name}/hash"] = _zarr((split.rows, HASH_BYTES), (split.shard_rows, HASH_BYTES), "uint8", _CRC)
        if self.head is not None:
            chunk = tuple(map(min, self.head.shape, _HEAD_CHUNK))
            found["head"] = _zarr(self.head.shape, chunk, self.head.dtype, _compressed(self.head), _CRC)
        return found

    def shard_files(self, split: str, shard: int) -> dict[str, str]:
        """The file of a shard by array, `hash` among them."""
        dims = {array: len(one.shape) for array, one in self.splits[split].arrays.items()} | {"hash": 1}
        return {array: f"{split}/{array}/c/{shard}" + "/0" * count for array, count in dims.items()}

    def head_files(self) -> list[str]:
        """The files of the head's chunks."""
        if self.head is None:
            return []
        down, across = (math.ceil(size / most) for size, most in zip(self.head.shape, _HEAD_CHUNK, strict=True))
        return [f"head/c/{i}/{j}" for i in range(down) for j in range(across)]


class ShardRecord(Frozen):
    """A sealed shard: size and SHA-256 of its file by array, `hash` among them, and sums over its rows."""

    rows: int
    bytes: dict[str, int]
    sha256: dict[str, str]
    statistics: dict[str, Any]


class Finished(Frozen):
    """`store.json`. `metadata` and `head` are SHA-256 by file; `totals` {split: {rows, bytes: {array: n}}, head:
    {bytes}} are sizes on disk."""

    format: str = FORMAT
    status: Literal["finished"] = "finished"
    description: Description
    metadata: dict[str, str]
    shards: dict[str, tuple[ShardRecord, ...]]
    head: dict[str, str]
    totals: dict[str, Any]

    def digests(self) -> dict[str, str]:
        """SHA-256 of every other file of the store."""
        found = self.metadata | self.head
        for split, records in self.shards.items():
            for shard, record in enumerate(records):
                files = self.description.shard_files(split, shard)
                found |= {file: record.sha256[name] for name, file in files.items()}
        return found


def _zarr(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str, *codecs: dict[str, Any]) -> dict[str, Any]:
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    return {"shape": shape, "data_type": dtype, "chunk_grid": grid, "codecs": codecs}


def _compressed(array: ArraySpec) -> dict[str, Any]:
    """What packs each kind best: integers leave their high bits unused, floats repeat their sign and exponent."""
    shuffle = "noshuffle" if array.itemsize == 1 else "bitshuffle" if array.dtype.startswith("uint") else "shuffle"
    return {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 3, "shuffle": shuffle}}


Record = TypeVar("Record", Description, Finished)


class Files:
    """The files of a store at a local path or at a URL that TensorStore knows (file://, gs://, s3://)."""

    def __init__(self, root: str):
        self.root = root.rstrip("/")
        with as_user_error(f"{root} is not a place for a logit store"):
            self.kvstore = ts.KvStore.open(_spec(self.root)).result()

    @property
    def local(self) -> Path | None:
        """Their directory, where they are on a local disk."""
        spec = self.kvstore.spec().to_json()
        return Path(spec["path"]) if spec["driver"] == "file" else None

    def fault(self, what: str) -> AbstractContextManager[None]:
        """Errors of TensorStore within it as a UserError that says what of the store is at fault."""
        return as_user_error(f"store {self.root}: {what}")

    def read(self, file: str) -> bytes | None:
        with self.fault(f"{file} cannot be read"):
            found = self.kvstore.read(file).result()
        return found.value if found.state == "value" else None

    def write(self, file: str, content: bytes | None) -> None:
        """Replace a file at once; None deletes it."""
        with self.fault(f"{file} could not be written"):
            self.kvstore.write(file, content).result()

    def list(self) -> set[str]:
        with self.fault("its files cannot be listed"):
            return {key.decode() for key in self.kvstore.list().result()}

    def sha256(self, file: str) -> tuple[str, int]:
        """Digest and size of a file. Raises UserError: it is missing."""
        if (content := self.read(file)) is None:
            raise UserError(f"store {self.root}: {file} is missing")
        return hashlib.sha256(content).hexdigest(), len(content)

    def load(self, kind: type[Record], file: str) -> Record | None:
        """The record in a JSON file that holds a digest of itself, None where there is no such file.

        Raises:
            UserError: a byte of it differs, or it has another format.
        """
        if (content := self.read(file)) is None:
            return None
        where = f"store {self.root}: {file}"
        try:
            plain = json.loads(content)
            found = plain["format"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{where} is damaged: it is not the JSON of a logit store") from error
        if found != FORMAT:
            raise UserError(f"{where} has the format {found!r}, this version reads {FORMAT!r}")
        plain.pop("sha256", None)
        if content != _signed(plain):
            raise UserError(f"{where} is damaged: its content is not what its sha256 says")
        return kind.model_validate(plain)

    def save(self, file: str, record: Record) -> None:
        self.write(file, _signed(record.model_dump(mode="json")))

    def open(self, metadata: dict[str, Any], create: bool = False, sparse: Sequence[str] = ()) -> dict[str, Any]:
        """TensorStore handles of arrays by directory. Chunks that are missing read as zeros in those named `sparse`, an
        error in others: then a chunk of nothing but zeros is written like any other."""
        handles = {}
        for name, one in metadata.items():
            spec = {"driver": "zarr3", "kvstore": (self.kvstore / f"{name}/").spec().to_json(), "metadata": one}
            missing = {"fill_missing_data_reads": name in sparse, "store_data_equal_to_fill_value": True}
            handles[name] = ts.open(spec | missing, open=True, create=create, context=_CONTEXT)
        for name, future in handles.items():
            with self.fault(f"{name}/zarr.json does not serve"):
                handles[name] = future.result()
        return handles


def _spec(root: str) -> Any:
    """TensorStore's name of a place. Its S3 driver does not read the variables that name another endpoint than
    Amazon's, as other clients do."""
    if "://" not in root:
        return {"driver": "file", "path": f"{Path(root).absolute()}/"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not root.startswith("s3://") or not endpoint:
        return f"{root}/"
    bucket, _, path = root.removeprefix("s3://").partition("/")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"driver": "s3", "bucket": bucket, "path": f"{path}/", "endpoint": endpoint, "aws_region": region}


@contextmanager
def as_user_error(sentence: str) -> Iterator[None]:
    """Errors of TensorStore as a UserError that begins with `sentence`."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, LookupError, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{sentence}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """TensorStore's message in one line, without the specification that it ends with."""
    return " ".join(re.sub(r" \[[a-z_ ]+='.*", "", str(error), flags=re.DOTALL).split())


def _signed(plain: dict[str, Any]) -> bytes:
    text = lambda one: (json.dumps(one, sort_keys=True, indent=1) + "\n").encode()
    return text(plain | {"sha256": hashlib.sha256(text(plain)).hexdigest()})


def differences(pairs: dict[str, tuple[Any, Any]]) -> dict[str, str]:
    """Of {what: (there, wanted)} those that differ, as "what there, not wanted"; digests by their beginning."""

    def short(value: Any) -> str:
        text = str(value)
        return f"{text[:12]}…" if re.fullmatch("[0-9a-f]{32,}", text) else repr(value)

    return {what: f"{what} {short(a)}, not {short(b)}" for what, (a, b) in pairs.items() if a != b}
