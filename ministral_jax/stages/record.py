"""Run a teacher over the training rows once and write what students need of it: a logit store.

Every row is there or not: a row counts as recorded once its hash is written, after its arrays. So a stage that was
killed goes on with what is missing, on any mesh and number of hosts. A file of the store is written by one process.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from pydantic import Field

from ministral_jax.data.pipeline import PackedData, chosen_rows, training_order
from ministral_jax.distributed.collectives import barrier, is_first
from ministral_jax.distributed.processes import poll, saving
from ministral_jax.errors import UserError
from ministral_jax.losses.evaluation import hidden
from ministral_jax.losses.targets import DEFAULT_CHUNK
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, head_matrix, placed_params
from ministral_jax.stages.base import Job, Params, Program, Result, load_stage
from ministral_jax.stages.figures import Figure
from ministral_jax.stages.manifest import digest
from ministral_jax.stages.rows import Packing, RowStage, abstract_batch, data_details, open_data
from ministral_jax.teachers.codecs import Codec, HiddenCodec, Layout, SampledCodec, layout, pack, uniforms, unpack
from ministral_jax.teachers.codecs import check as check_codec
from ministral_jax.teachers.encode import encoder
from ministral_jax.teachers.statistics import EDGES, merge, statistics, summarise
from ministral_jax.teachers.store import StoreInfo, Writer, open_for_writing
from ministral_jax.teachers.store import Teacher as RecordedTeacher
from ministral_jax.teachers.store_format import row_bytes
from ministral_jax.teachers.teacher import Teacher, recorded
from ministral_jax.training.progress import ProgressLine

_LARGEST_FILE = 2**29
"""Bytes before compression: each batch that adds to a file writes it anew."""


class Record(RowStage):
    """Run `from`, a teacher, over the training rows once and write what students need of its distribution."""

    figures: ClassVar = (
        Figure("bytes_per_token", "size of the store", "bytes per token", "lower"),
        Figure("tail_mass", "probability outside the stored entries", "share", "lower"),
        Figure("teacher_entropy", "entropy of the teacher", "nats per token"),
    )
    makes_model: ClassVar = False

    do: Literal["record"]
    source: str = Field(alias="from")
    rows: int | None = Field(default=None, ge=1)
    """Training rows, the first ones in the order of `seed`, as a student with that seed reads them; None is all."""
    held_out_rows: int = Field(default=64, ge=1)
    """Held-out rows, in file order, whose hidden states are kept for exact evaluations."""
    codec: Codec = SampledCodec()
    shard: int = Field(default=32, ge=1)
    """Rows in one file."""
    store: str | None = None
    """Where the store is written: a path, or a URL such as gs://bucket/name; None is in the stage's directory."""

    def check_reader(self, student: Any, name: str, where: str) -> None:
        """Raise `UserError` when a student would read rows that this stage, `name`, does not record."""
        if student.batch.length != self.batch.length:
            raise UserError(
                f"{where}.batch.length = {student.batch.length} differs from the {self.batch.length} of the rows that "
                f"{name!r} records"
            )
        if student.evaluate.rows > self.held_out_rows:
            raise UserError(
                f"{where}.evaluate.rows = {student.evaluate.rows} is more than stages.{name}.held_out_rows = "
                f"{self.held_out_rows}"
            )
        needed = student.steps * student.batch.sequences
        if self.rows is not None and (student.seed != self.seed or needed > self.rows):
            raise UserError(
                f"{where} reads {needed} rows in the order of seed {student.seed}, {name!r} records the first "
                f"{self.rows} in the order of seed {self.seed}; raise stages.{name}.rows, leave it out (all rows), or "
                "use one seed"
            )

    def prepare(self, job: Job[Any], packing: Packing) -> None:
        """A store must have room for its entries."""
        data = packing.rows(job)
        try:
            check_codec(self.codec, job.spec.vocab, data.tokenizer.control_ids)
        except UserError as error:
            raise UserError(f"{job.where}: {error}") from None

    def programs(self, job: Job[Record]) -> dict[str, Program]:
        params = placed_params(job.spec, job.placement, jnp.dtype(self.compute.dtype))
        exact = HiddenCodec.model_validate({"dtype": self.compute.dtype})
        found = {}
        for split, codec, forced in (("train", self.codec, job.tokens.control), ("held_out", exact, ())):
            batch = dict(abstract_batch(job))
            if (drawn := uniforms(codec, self.seed, bytes(16), self.batch.length)) is not None:
                shape = (self.batch.sequences, *drawn.shape)
                lies = job.placement.batch_sharding("uniforms", len(shape))
                batch["uniforms"] = jax.ShapeDtypeStruct(shape, drawn.dtype, sharding=lies)
            found[f"record/{split}"] = Program(_compile(job, job.spec, codec, forced), (params, batch))
        return found

    def run(self, job: Job[Record]) -> Result:
        spec, params = load_stage(job.source, jnp.dtype(self.compute.dtype), job.placement)
        data = open_data(job)
        job = job.with_tokens(data.tokenizer)
        programs = self.programs(job)
        splits = _splits(self, spec, data)
        writer = _open(job, spec, data, splits)
        _write_head(writer, params)
        for split in splits:
            _record(job, programs[f"record/{split.name}"].function, params, data, split, writer)
        merged = _seal(job, splits, writer)
        tokens = sum(len(split.order) for split in splits) * data.length
        details = {"data": data_details(data), "store": merged}
        return Result(_figures(merged["train"]), tokens, details=details)


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


def _splits(stage: Record, spec: ModelSpec, data: PackedData) -> list[Split]:
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
    stage = job.stage
    info = StoreInfo(
        codec=stage.codec.model_dump(mode="json"),
        teacher=RecordedTeacher(stage=job.source.name, digest=digest(job.source)),
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


def _record(job: Job[Record], encode: Any, params: Params, data: PackedData, split: Split, writer: Writer) -> None:
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


def _compile(job: Job[Record], spec: ModelSpec, codec: Codec, forced: tuple[int, ...]) -> Any:
    """`(parameters, batch)` to what `pack` takes, each row whole on the devices that hold it."""
    placement, rules = job.placement, job.placement.rules
    model = VLM(spec, job.stage.compute)
    encode = encoder(codec, placement, rules, forced, DEFAULT_CHUNK)

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


def recorded_teacher(job: Job[Any], recorder: Record) -> Teacher:
    """What was recorded as the teacher of another stage, `job`, with abstract arrays."""
    stage, placement = job.stage, job.placement
    spec = job.graph.specs[recorder.source]
    exact = HiddenCodec.model_validate({"dtype": recorder.compute.dtype})

    def added(codec: Codec, forced: tuple[int, ...]) -> dict[str, Any]:
        stored = layout(codec, stage.batch.length, spec.width, spec.vocab, forced)
        one = unpack(codec, {name: np.zeros((1, *array.shape), array.dtype) for name, array in stored.items()})
        return {
            name: jax.ShapeDtypeStruct(
                (stage.batch.sequences, *array.shape[1:]),
                array.dtype,
                sharding=placement.batch_sharding(name, array.ndim),
            )
            for name, array in one.items()
        }

    head = jax.ShapeDtypeStruct(
        (spec.width, spec.vocab),
        jnp.dtype(recorder.compute.dtype),
        sharding=job.teacher_placement.lies((spec.width, spec.vocab), ("embed", "vocab")),
    )
    forced = job.tokens.control
    teacher = recorded(recorder.codec, exact, forced, head)
    return replace(teacher, train_arrays=added(recorder.codec, forced), held_out_arrays=added(exact, ()))
