"""A small logit store: what test_store.py writes, and the process that it kills while it writes. Loads no JAX."""

import hashlib
import sys

import ml_dtypes
import numpy as np

from ministral_jax.teachers.store import open_for_writing
from ministral_jax.teachers.store_format import ArraySpec, Description, SplitSpec, StoreInfo, TeacherIdentity

ROWS = {"train": 42, "held_out": 5}
SHARD_ROWS = 8
DTYPES = ("uint8", "uint16", "uint32", "float32", "bfloat16", "float8_e4m3fn")
LAYOUT = {dtype: ArraySpec(shape=(6, 3), dtype=dtype) for dtype in DTYPES}
LAYOUT["scalar"] = ArraySpec(shape=(), dtype="float32")
HEAD = ArraySpec(shape=(5, 5000), dtype="bfloat16")
INFO = StoreInfo(
    codec={"kind": "topk", "entries": 64},
    teacher=TeacherIdentity(stage="parent", digest="a1" * 32),
    tokenizer_digest="b2" * 32,
    data_digest="c3" * 32,
    length=6,
    vocab=5000,
    width=5,
    forced=(0, 1),
    seed=0,
    dtype="float32",
)


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def hashes(split, rows):
    return [hashlib.md5(f"{split} {row}".encode()).digest() for row in rows]


def arrays(split, rows):
    """Arrays [n, ..] of rows; every third row is zeros."""
    parts = []
    for row in rows:
        rng = np.random.default_rng([row, len(split)])
        values = rng.integers(0, 250, (6, 3)) * (row % 3 > 0)
        parts.append({dtype: values.astype(numpy_dtype(dtype)) for dtype in DTYPES} | {"scalar": np.float32(row)})
    return {name: np.stack([part[name] for part in parts]) for name in LAYOUT}


def head():
    return np.random.default_rng(7).normal(size=HEAD.shape).astype(numpy_dtype(HEAD.dtype))


def statistics(parts):
    return {"tokens": float(parts["uint32"].astype(np.float64).sum()), "first": parts["scalar"][:1].tolist()}


def writer(root, create=True, info=INFO, rows=ROWS, shard_rows=SHARD_ROWS, layout=LAYOUT, head=HEAD):
    splits = {split: SplitSpec(rows=count, shard_rows=shard_rows, arrays=layout) for split, count in rows.items()}
    return open_for_writing(str(root), Description(info=info, splits=splits, head=head), create=create)


def write(store, split, rows, of=None):
    """Write `rows`, or in their place what belongs to the rows `of`."""
    store.write(split, rows, hashes(split, rows if of is None else of), arrays(split, rows if of is None else of))


def seal(*stores):
    """Records of all shards by split, sealed in turns."""
    return {
        split: [stores[k % len(stores)].seal_shard(split, k, statistics) for k in range(spec.shards)]
        for split, spec in stores[0].description.splits.items()
    }


def record(root, groups, create=True):
    """Write the rows that are not there in groups (function from rows to lists of rows) and finish the store."""
    store = writer(root, create)
    for split in ROWS:
        for rows in groups(np.flatnonzero(~store.done(split))):
            write(store, split, rows)
    store.put_head(head())
    store.finish(seal(store))


def shuffled(seed, most=3):
    """Groups of 1..most rows in random order."""

    def groups(rows):
        rng = np.random.default_rng(seed)
        order = rng.permutation(rows)
        while len(order):
            size = rng.integers(1, most + 1)
            yield order[:size].tolist()
            order = order[size:]

    return groups


if __name__ == "__main__":
    print("ready", flush=True)
    record(sys.argv[1], shuffled(int(sys.argv[2])))
