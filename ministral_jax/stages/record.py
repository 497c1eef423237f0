"""Run a teacher over the training rows once and write what students need of it: a logit store.

Every row is there or not: a row counts as recorded once its hash is written, after its arrays. So a stage that was
killed goes on with what is missing, on any mesh and number of hosts. A file of the store is written by one process.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ministral_jax.config import RecordStage
from ministral_jax.data.pipeline import PackedData, chosen_rows, training_order
from ministral_jax.distributed.collectives import barrier, is_first
from ministral_jax.distributed.processes import poll, saving
from ministral_jax.losses.evaluation import hidden
from ministral_jax.losses.targets import DEFAULT_CHUNK
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, head_matrix
from ministral_jax.stages.job import Job, Params, Result, load_stage
from ministral_jax.stages.looped import data_details, open_data
from ministral_jax.stages.manifest import digest
from ministral_jax.teachers.codecs import Codec, HiddenCodec, Layout, layout, pack, uniforms
from ministral_jax.teachers.encode import encoder
from ministral_jax.teachers.statistics import EDGES, merge, statistics, summarise
from ministral_jax.teachers.store import StoreInfo, Teacher, Writer, open_for_writing
from ministral_jax.teachers.store_format import row_bytes
from ministral_jax.training.metrics import ProgressLine

_LARGEST_FILE = 2**29
"""Bytes before compression: each batch that adds to a file writes it anew."""


@dataclass(frozen=True)
class Split:
    """One split of the store: which packed rows it holds, in which order, and how."""

    name: str
    order: np.ndarray
    """Numbers of packed rows; row i of the store is row `order[i]` of the data."""
    codec: Codec
    forced: tuple[int, ...]
    layout: dict[str, Layout]
    shard: int
    """Rows in one file."""


def run(job: Job) -> Result:
    stage: RecordStage = job.stage
    assert job.source is not None
    spec, params = load_stage(job.source, jnp.dtype(stage.compute.dtype), job.placement)
    data = open_data(job)
    splits = _splits(stage, spec, data)
    writer = _open(job, spec, data, splits)
    _write_head(writer, params)
    for split in splits:
        _record(job, spec, params, data, split, writer)
    merged = _seal(job, splits, writer)
    tokens = sum(len(split.order) for split in splits) * data.length
    details = {"data": data_details(data), "store": merged}
    return Result(_figures(merged["train"]), tokens, details=details)


def _splits(stage: RecordStage, spec: ModelSpec, data: PackedData) -> list[Split]:
    """Training rows by the stage's codec; held-out rows exactly, as hidden states in the dtype of the computation."""
    train = training_order(data, stage.seed)[: stage.rows]
    held_out = np.arange(data.counts["held_out"]["rows"])[: stage.held_out_rows]
    exact = HiddenCodec.model_validate({"dtype": stage.compute.dtype})

    def split(name: str, order: np.ndarray, codec: Codec, forced: tuple[int, ...]) -> Split:
        arrays = layout(codec, data.length, spec.width, spec.vocab, forced)
        fit = max(_LARGEST_FILE // max(row_bytes(one) for one in arrays.values()), 1)
        return Split(name, order, codec, forced, arrays, min(stage.shard, fit))

    return [split("train", train, stage.codec, data.tokenizer.control_ids), split("held_out", held_out, exact, ())]


def _open(job: Job, spec: ModelSpec, data: PackedData, splits: list[Split]) -> Writer:
    stage: RecordStage = job.stage
    assert job.source is not None
    info = StoreInfo(
        codec=stage.codec.model_dump(mode="json"),
        teacher=Teacher(stage=job.source.name, digest=digest(job.source)),
        tokenizer_digest=data.tokenizer.digest,
        data_digest=data.digest,
        length=data.length,
        vocab=spec.vocab,
        width=spec.width,
        forced=data.tokenizer.control_ids,
        seed=stage.seed,
        dtype=stage.compute.dtype,
    )
    root = stage.store or str(job.directory / "store")
    sizes = {split.name: (len(split.order), split.layout) for split in splits}
    head = Layout((spec.width, spec.vocab), stage.compute.dtype)
    # one creates, the others then find it
    if not is_first():
        barrier("store created")
    shards = {split.name: split.shard for split in splits}
    writer = open_for_writing(root, info, sizes, shards, head=head, create=is_first())
    if is_first():
        barrier("store created")
    return writer


def _write_head(writer: Writer, params: Params) -> None:
    """The teacher's output matrix, with which hidden states are the whole distribution; each part by one holder."""
    for shard in jax.jit(head_matrix)(params).addressable_shards:
        if shard.replica_id == 0:
            writer.put_head(np.asarray(shard.data), shard.index)


def _record(job: Job, spec: ModelSpec, params: Params, data: PackedData, split: Split, writer: Writer) -> None:
    """Bring all rows of a split into the store, a global batch at a time."""
    stage, placement = job.stage, job.placement
    count = stage.batch.sequences
    owners = placement.row_owners(count)
    mine = next(i for i, (rows, _) in enumerate(owners) if np.array_equal(rows, placement.rows(count)))
    writes = owners[mine][1] == jax.process_index()
    done = writer.done(split.name)
    barrier(f"what of {split.name} is there")  # every process plans by the same, before one of them writes
    plan = plan_batches(len(split.order), split.shard, len(owners), count // len(owners))
    steps = [step for step in plan if not done[step[step >= 0]].all()]
    encode = _compile(job, spec, split)
    line = ProgressLine(f"{job.name} {split.name}", len(plan), len(plan) - len(steps))
    written, began = 0, 0.0

    def write(rows: np.ndarray, hashes: list[bytes], encoded: dict[str, jax.Array]) -> int:
        if not writes:
            return 0
        own = np.flatnonzero((rows >= 0) & ~done[rows])
        order = np.argsort(placement.order(data.length))
        local = {name: placement.local_rows(array)[own] for name, array in encoded.items()}
        arrays = {name: a[:, order] if a.shape[1:2] == (data.length,) else a for name, a in local.items()}
        packed = pack(split.codec, arrays)
        if len(own):
            writer.write(split.name, rows[own], [hashes[i] for i in own], packed)
        return sum(array.nbytes for array in packed.values())

    try:
        pending: tuple[np.ndarray, list[bytes], dict[str, jax.Array]] | None = None
        for number, (rows, hashes, batch) in enumerate(_read(job, data, split, [s[mine] for s in steps])):
            poll(f"{split.name} batch {number + 1}", slow=number == 0)
            encoded = encode(params, batch)
            if pending is not None:  # the device already works on this batch while the last one is written
                written += write(*pending)
            pending = (rows, hashes, encoded)
            began = began or time.monotonic()  # what came before it was compiling
            speed = number * count * data.length / max(time.monotonic() - began, 1e-9)
            note = f"{speed:,.0f} tokens/s  {written * len(owners) / 1e6:,.0f} MB before compression"
            line.update(len(plan) - len(steps) + number + 1, note)
        if pending is not None:
            write(*pending)
    finally:
        line.close()
    barrier(f"{split.name} recorded")


def plan_batches(rows: int, shard: int, groups: int, local: int) -> list[np.ndarray]:
    """Which rows each batch holds, `[groups, local]`, -1 for none.

    A group is the processes that hold the same `local` rows of a batch. Shards go round them, so that a file is written
    by one of them alone. The plan does not depend on what is done: a row is always computed among the same others.
    """
    queues: list[list[int]] = [[] for _ in range(groups)]
    for number, first in enumerate(range(0, rows, shard)):
        queues[number % groups].extend(range(first, min(first + shard, rows)))
    steps = -(-max(map(len, queues)) // local) if rows else 0
    plan = np.full((groups, steps * local), -1)
    for group, queue in enumerate(queues):
        plan[group, : len(queue)] = queue
    return list(plan.reshape(groups, steps, local).swapaxes(0, 1))


def _read(job: Job, data: PackedData, split: Split, steps: list[np.ndarray]) -> Iterator[tuple[np.ndarray, Any, Any]]:
    """(rows of the store, their hashes, the global batch) of each step."""
    numbers = [np.where(step >= 0, split.order[step], -1) for step in steps]
    stream = chosen_rows(data, split.name, numbers)
    try:
        for rows, (batch, hashes) in zip(steps, stream, strict=True):
            draws = [uniforms(split.codec, job.stage.seed, found or bytes(16), data.length) for found in hashes]
            if draws[0] is not None:
                batch = batch | {"uniforms": np.stack([u for u in draws if u is not None])}
            yield rows, hashes, job.placement.place(batch, job.stage.batch.sequences)
    finally:
        stream.close()  # type: ignore[attr-defined]


def _compile(job: Job, spec: ModelSpec, split: Split) -> Any:
    """`(parameters, batch)` to what `pack` takes, each row whole on the devices that hold it."""
    placement, rules = job.placement, job.placement.rules
    model = VLM(spec, job.stage.compute)
    encode = encoder(split.codec, placement, rules, split.forced, DEFAULT_CHUNK)

    def record(params: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        states = hidden(model, params, batch)
        return encode(states, head_matrix(params), batch["loss_mask"], batch.get("uniforms"))

    by_row = NamedSharding(placement.mesh, PartitionSpec(rules.batch))
    return jax.jit(rules.scoped(record), out_shardings=by_row)


def _seal(job: Job, splits: list[Split], writer: Writer) -> dict[str, Any]:
    """Hash and summarise every file, shared out over the processes; then the store is finished."""

    def seal(split: Split, shards: Iterable[int]) -> list[dict[str, Any]]:
        count = partial(statistics, split.codec, forced=split.forced)
        records = []
        for shard in shards:
            saving()
            records.append(writer.seal_shard(split.name, shard, count))
        return records

    for split in splits:
        seal(split, range(writer.shards(split.name))[jax.process_index() :: jax.process_count()])
    barrier("sealed")
    records = {split.name: seal(split, range(writer.shards(split.name))) for split in splits}  # all are there by now
    barrier("records read")
    if is_first():
        writer.finish(records)
    barrier("store finished")
    return {split.name: _summary(split, records[split.name]) for split in splits}


def _summary(split: Split, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the manifest and the report say of a split."""
    merged = merge([record["statistics"] for record in records])
    found = summarise(merged)
    if "tail_mass" in found:
        by_shard = [summarise(record["statistics"])["tail_mass"] for record in records]
        found["tail_histogram"] = {"at_most": EDGES.tolist(), "tokens": merged["tail_histogram"]}
        found["tail_by_shard"] = {name: [tail[name] for tail in by_shard] for name in ("mean", "p99")}
    size: dict[str, int] = {}
    for record in records:
        for name, count in record["bytes"].items():
            size[name] = size.get(name, 0) + count
    tokens = max(found["tokens"], 1)
    return {
        "codec": split.codec.model_dump(mode="json"),
        "rows": len(split.order),
        "shards": len(records),
        "bytes": size,
        "bytes_per_token": sum(size.values()) / tokens,
        **found,
    }


def _figures(train: dict[str, Any]) -> dict[str, float]:
    """The summary's means: what a sweep and a table compare."""
    means = {key: value.get("mean") if isinstance(value, dict) else value for key, value in train.items()}
    return {key: value for key, value in means.items() if isinstance(value, float)}
