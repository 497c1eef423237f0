"""What a logit store looks like on disk: its description, the metadata of its arrays, and files at a path or a URL.

    recording.json              what the store holds, written first: StoreInfo, splits, rows per shard
    <split>/<array>/            zarr3 array [N, ..]: a shard (file) holds `shard_rows` rows, an inner chunk one row
    <split>/hash/               zarr3 array [N, 16] uint8: content hash of each row, all zero where the row is not there
    head/                       zarr3 array [D', V]: the teacher's output matrix, where the codec needs it
    recording/<split>/<n>.json  records of sealed shards, until the store is finished
    store.json                  the description again with the records of all shards, written last: its presence means finished

zarr3 (https://zarr-specs.readthedocs.io/en/latest/v3/core/) with `sharding_indexed`; every chunk and index carries a
crc32c, and `store.json` the SHA-256 of every file.
"""

from __future__ import annotations

from typing import Any, Protocol

import ml_dtypes
import numpy as np
import tensorstore as ts

from ministral_jax.models.spec import Frozen

FORMAT = "ministral-jax logit store 1"
DTYPES = ("uint8", "uint16", "uint32", "float32", "bfloat16", "float8_e4m3fn")
HASH_BYTES = 16
_CRC = {"name": "crc32c"}
_HEAD_CHUNK = (1024, 4096)
_LARGEST_CHUNK = 2**31 - 17  # what Blosc 1 takes in one buffer
# Every row is read once an epoch, so that a cache would only cost memory.
_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 0}})


class ArrayLayout(Protocol):
    """Shape and dtype of one row of an array, or of the head (`codecs.Layout`)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


class Teacher(Frozen):
    """The stage whose parameters the teacher has, and their digest."""

    stage: str
    digest: str


class StoreInfo(Frozen):
    """What the rows of a store are: two stores with equal info and data hold the same bytes.

    `length` is T, `vocab` V, `width` D' of the teacher's states; `forced` are the ids that every token has an entry for;
    `dtype` is what the teacher computed in.
    """

    format: str = FORMAT
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


class Split(Frozen):
    """N rows, and shape and dtype of one row of every array."""

    rows: int
    arrays: dict[str, tuple[tuple[int, ...], str]]


class Description(Frozen):
    """Content of `recording.json`."""

    info: StoreInfo
    splits: dict[str, Split]
    shard_rows: int
    head: tuple[tuple[int, ...], str] | None = None

    def shards(self, split: str) -> int:
        return -(-self.splits[split].rows // self.shard_rows)

    def rows_of(self, split: str, shard: int) -> range:
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.splits[split].rows))

    def metadata(self) -> dict[str, dict[str, Any]]:
        """zarr3 metadata by array, as `<split>/<array>`, `<split>/hash` and `head`."""
        found = {}
        for name, split in self.splits.items():
            for array, (shape, dtype) in split.arrays.items():
                found[f"{name}/{array}"] = _sharded(split.rows, shape, dtype, self.shard_rows)
            found[f"{name}/hash"] = _zarr(
                (split.rows, HASH_BYTES), "uint8", (self.shard_rows, HASH_BYTES), [{"name": "bytes"}, _CRC]
            )
        if self.head is not None:
            shape, dtype = self.head
            chunk = tuple(min(n, most) for n, most in zip(shape, _HEAD_CHUNK, strict=True))
            found["head"] = _zarr(shape, dtype, chunk, _compressed(dtype))
        return found

    def shard_files(self, split: str, shard: int) -> dict[str, str]:
        """The file of a shard by array, `hash` among them, relative to the store."""
        dims = {array: len(shape) for array, (shape, _) in self.splits[split].arrays.items()} | {"hash": 1}
        return {array: f"{split}/{array}/c/{shard}" + "/0" * n for array, n in dims.items()}


def itemsize(dtype: str) -> int:
    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


def _zarr(shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...], codecs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "shape": shape,
        "data_type": dtype,
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": codecs,
    }


def _compressed(dtype: str) -> list[dict[str, Any]]:
    size = itemsize(dtype)
    blosc = {
        "cname": "zstd",
        "clevel": 3,
        "shuffle": "shuffle" if size > 1 else "noshuffle",
        "typesize": size,
        "blocksize": 0,
    }
    return [_bytes(size), {"name": "blosc", "configuration": blosc}, _CRC]


def _bytes(size: int) -> dict[str, Any]:
    return {"name": "bytes", "configuration": {"endian": "little"}} if size > 1 else {"name": "bytes"}


def _sharded(rows: int, shape: tuple[int, ...], dtype: str, shard_rows: int) -> dict[str, Any]:
    sharding = {
        "chunk_shape": (1, *shape),
        "codecs": _compressed(dtype),
        "index_codecs": [_bytes(8), _CRC],
        "index_location": "end",
    }
    return _zarr((rows, *shape), dtype, (shard_rows, *shape), [{"name": "sharding_indexed", "configuration": sharding}])
