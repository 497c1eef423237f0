"""What the policy that a stage begins with gives the answers of its pairs: computed once, before it is trained.

A line of `reference.jsonl` is a batch of rows: their content hashes, the log-probabilities of each row's answers, and a
digest of these and of all that they depend on. Lines that a kill has cut, that were damaged or that are of something
else have another digest, and are computed again. Float32 numbers are the same after a JSON file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ministral_jax.data.batch import padded
from ministral_jax.data.bins import place
from ministral_jax.data.pipeline import Join, chosen_rows, row_hashes, row_numbers
from ministral_jax.data.prepare import PackedData
from ministral_jax.data.rows import pairs_per_row
from ministral_jax.distributed.collectives import barrier, from_first, is_first
from ministral_jax.distributed.processes import poll
from ministral_jax.files import digest_of, read_jsonl, write_text
from ministral_jax.places import Lines
from ministral_jax.stages.base import Job, Params
from ministral_jax.stages.manifest import digest
from ministral_jax.stages.rows import order_of
from ministral_jax.training.progress import ProgressLine

Read = Callable[[Params, dict[str, jax.Array]], jax.Array]
"""`(params, batch) -> [B, S]`, whole on every device: the log-probability of each answer."""
Key = tuple[str, tuple[int, ...]]
"""The split and the numbers of a batch's rows in it, -1 for none."""


def reference_logprobs(job: Job[Any], data: PackedData, read: Read, params: Params) -> Join:
    """Compute what is not in the stage's directory yet, for all rows that it will read. The result gives rows, named by
    their content hashes, `reference` float32 `[n, S]`: answer s of a row is its segment s + 1, 0 where there is none.
    """
    path, made_of = job.directory / "reference.jsonl", _made_of(job, data)
    plan = _plan(job, data)
    known = {(split, tuple(rows)) for split, rows in from_first(_begin(path, made_of) if is_first() else [])}
    todo = [key for key in plan if key not in known]
    line, count = ProgressLine(f"{job.name} reference", len(plan), len(plan) - len(todo)), job.stage.batch.sequences
    kept = Lines(path) if is_first() else None
    try:
        for number, (key, batch) in enumerate(_batches(job, data, todo), 1):
            poll(f"reference batch {number}", slow=number == 1)
            found = np.asarray(read(params, place(job.placement, batch, count, data.vision)))
            if kept is not None:
                hashes = row_hashes(data, *key)
                values = [_trimmed(row) for row in found[: len(hashes)]]
                kept.add(json.dumps(_line(made_of, key, [h.hex() for h in hashes], values)))
            line.update(len(plan) - len(todo) + number, "")
    finally:
        line.close()
        if kept is not None:
            kept.close()
    barrier("reference log-probabilities")
    size, values = 2 * pairs_per_row(data.length), dict[bytes, np.ndarray]()
    for one in _lines(path, made_of):
        values |= {bytes.fromhex(h): np.array(v, np.float32) for h, v in zip(one["rows"], one["logprobs"], strict=True)}
    row = lambda h: padded(values[h], size)
    return lambda hashes: {"reference": np.array([row(h) for h in hashes], np.float32).reshape(-1, size)}


def _made_of(job: Job[Any], data: PackedData) -> str:
    """Of all that decides on them: the policy, the rows, and among which others a row is computed."""
    stage = job.stage
    how = [asdict(stage.compute), stage.batch.sequences, stage.seed]
    return digest_of([digest(job.source), data.digest, how])


def _plan(job: Job[Any], data: PackedData) -> list[Key]:
    """The batches: of the training rows in the order in which they will be read, of all that are there where batches
    may be left out, and of the held-out ones."""
    stage = job.stage
    count = stage.batch.sequences
    needed = None if stage.guard.action == "rollback" else stage.steps * count
    held_out = np.arange(data.counts["held_out"]["rows"])[: stage.evaluate.rows]
    splits = {"train": row_numbers(data, order_of(job), needed), "held_out": held_out}
    plan = list[Key]()
    for split, rows in splits.items():
        whole = np.full(-(-len(rows) // count) * count, -1)
        whole[: len(rows)] = rows
        plan += [(split, tuple(part)) for part in whole.reshape(-1, count).tolist()]
    return plan


def _batches(job: Job[Any], data: PackedData, todo: list[Key]) -> Iterator[tuple[Key, dict[str, Any]]]:
    """This process's rows of the batches."""
    own = job.placement.rows(job.stage.batch.sequences)
    for split in ("train", "held_out"):
        keys = [key for key in todo if key[0] == split]
        if keys:
            found: Any = chosen_rows(data, split, [numbers for _, numbers in keys], own)
            with closing(found):
                yield from ((key, batch) for key, (batch, _) in zip(keys, found, strict=True))


def _begin(path: Path, made_of: str) -> list[Any]:
    """Leave the good lines alone in the file; what they are of."""
    lines = _lines(path, made_of)
    write_text(path, "".join(json.dumps(one) + "\n" for one in lines))
    return [one["batch"] for one in lines]


def _lines(path: Path, made_of: str) -> list[dict[str, Any]]:
    return [one for one in read_jsonl(path) if one.get("digest") == _digest(made_of, one)]


def _line(made_of: str, key: Key, rows: list[str], logprobs: list[list[float]]) -> dict[str, Any]:
    one = {"batch": list(key), "rows": rows, "logprobs": logprobs}
    return one | {"digest": _digest(made_of, one)}


def _digest(made_of: str, one: dict[str, Any]) -> str:
    return digest_of([made_of, *(one.get(name) for name in ("batch", "rows", "logprobs"))])


def _trimmed(row: np.ndarray) -> list[float]:
    """Up to the last answer."""
    return [float(x) for x in row[: np.flatnonzero(row).max(initial=-1) + 1]]
