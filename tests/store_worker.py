"""A small logit store: what test_store.py writes, and the process that it kills while it writes. Loads no JAX."""

import hashlib
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from ministral_jax.teachers.store import StoreInfo, Teacher, open_for_writing

ROWS = {"train": 42, "held_out": 5}
SHARD_ROWS = 8
DTYPES = ("uint8", "uint16", "uint32", "float32", "bfloat16", "float8_e4m3fn")
LAYOUT = {dtype: SimpleNamespace(shape=(6, 3), dtype=dtype) for dtype in DTYPES} | {
    "scalar": SimpleNamespace(shape=(), dtype="float32")
}
HEAD = SimpleNamespace(shape=(5, 5000), dtype="bfloat16")
INFO = StoreInfo(
    codec={"kind": "topk", "entries": 64},
    teacher=Teacher(stage="parent", digest="a1" * 32),
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


def writer(root, create=True, info=INFO, rows=ROWS, shard_rows=SHARD_ROWS, layout=LAYOUT):
    splits = {split: (count, layout) for split, count in rows.items()}
    return open_for_writing(str(root), info, splits, dict.fromkeys(splits, shard_rows), create=create, head=HEAD)


def finish(store):
    store.put_head(head())
    store.finish(
        {split: [store.seal_shard(split, k, statistics) for k in range(store.shards(split))] for split in ROWS}
    )


def record(root, groups, create=True):
    """Write the rows that are not there in groups (function from rows to lists of rows) and finish the store."""
    store = writer(root, create)
    for split in ROWS:
        for rows in groups(np.flatnonzero(~store.done(split))):
            store.write(split, rows, hashes(split, rows), arrays(split, rows))
    finish(store)


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
