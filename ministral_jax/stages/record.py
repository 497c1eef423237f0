"""Run a teacher over the training rows once and write what students need of it: a logit store.

Every row is there or not: a row counts as recorded once its hash is written, after its arrays. So a stage that was
killed goes on with what is missing, on any mesh and number of hosts. A file of the store is written by one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from pydantic import Field

from ministral_jax.data.bins import place
from ministral_jax.data.pipeline import chosen_rows, row_numbers
from ministral_jax.data.prepare import PackedData
from ministral_jax.distributed.collectives import barrier, first_then_all, is_first
from ministral_jax.distributed.placement import Placement
from ministral_jax.distributed.processes import poll, saving
from ministral_jax.errors import UserError
from ministral_jax.losses.evaluation import hidden
from ministral_jax.losses.targets import DEFAULT_CHUNK
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, head_matrix, placed_params
from ministral_jax.settings import Place
from ministral_jax.stages.base import Job, Params, Program, Result, Stage, load_stage
from ministral_jax.stages.figures import Figure
from ministral_jax.stages.manifest import digest
from ministral_jax.stages.rows import Packing, RowStage, abstract_batch, data_details, first_row, open_data, order_of
from ministral_jax.teachers import codecs, store_format
from ministral_jax.teachers.encode import encoder
from ministral_jax.teachers.statistics import statistics, summarise
from ministral_jax.teachers.store import Writer, open_for_writing
from ministral_jax.teachers.store_format import HASH_BYTES
from ministral_jax.teachers.summary import SplitSummary
from ministral_jax.teachers.teacher import Teacher, recorded
from ministral_jax.training.progress import ProgressLine

Encode = Callable[[dict[str, Any]], dict[str, jax.Array]]
Encoded = tuple[np.ndarray, list[bytes], dict[str, jax.Array]]
"""Rows of the store, -1 for none, that this process holds of a batch; their hashes; the whole batch's arrays."""


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
    """Training rows from `first_row` on, in the order of `seed` as a student with that seed reads them; None is all."""
    held_out_rows: int = Field(default=64, ge=1)
    """Held-out rows, in file order, whose hidden states are kept for exact evaluations."""
    codec: codecs.Codec = codecs.SampledCodec()
    shard: int = Field(default=32, ge=1)
    """Rows in one file."""
    store: Place | None = None
    """Where the store is written: a path, or a URL such as gs://bucket/name; None is in the stage's directory."""

    def check_reader(self, student: Any, name: str, stages: Mapping[str, Stage], where: str) -> None:
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
        if self.rows is None or student.data != self.data:  # whether it is the same data is known once it is packed
            return
        theirs, ours = first_row(student, stages), first_row(self, stages)
        last, kept = theirs + student.rows_read, ours + self.rows
        if student.seed != self.seed or theirs < ours or last > kept:
            raise UserError(
                f"{where} reads rows {theirs} to {last} in the order of seed {student.seed}, {name!r} records {ours} "
                f"to {kept} in the order of seed {self.seed}; set stages.{name}.first_row and rows, leave rows out "
                "(all), or use one seed"
            )

    def prepare(self, job: Job[Any], packing: Packing) -> None:
        """A store must have room for its entries."""
        data = packing.rows(job)
        try:
            codecs.check(self.codec, job.spec.vocab, data.tokenizer.control_ids)
        except UserError as error:
            raise UserError(f"{job.where}: {error}") from None

    def programs(self, job: Job[Record]) -> dict[str, Program]:
        params = placed_params(job.spec, job.placement, jnp.dtype(self.compute.dtype))
        found = {}
        for split, (codec, forced) in self.kept(job.tokens.control).items():
            batch = dict(abstract_batch(job))
            if (drawn := codecs.uniforms(codec, self.seed, bytes(HASH_BYTES), self.batch.length)) is not None:
                batch["uniforms"] = _described(job, "uniforms", drawn)
            found[f"record/{split}"] = Program(_compile(job, codec, forced), (params, batch))
        return found

    def kept(self, control: tuple[int, ...]) -> dict[str, tuple[codecs.Codec, tuple[int, ...]]]:
        """Codec and forced ids of each split: held-out rows are kept exactly, as hidden states."""
        return {"train": (self.codec, control), "held_out": (codecs.exact(self.compute.dtype), ())}

    def run(self, job: Job[Record]) -> Result:
        spec, params = load_stage(job.source, jnp.dtype(self.compute.dtype), job.placement)
        data = open_data(job)
        job = job.with_tokens(data.tokenizer)
        programs, splits = self.programs(job), _splits(job, spec, data)
        root, description = self.store or str(job.directory / "store"), _describe(job, spec, data, splits)
        opened: list[Writer] = []
        first_then_all(lambda: opened.append(open_for_writing(root, description, create=is_first())))
        (writer,) = opened
        # The output matrix, with which hidden states are the whole distribution; each part by one holder.
        for shard in jax.jit(head_matrix)(params).addressable_shards:
            if shard.replica_id == 0:
                writer.put_head(np.asarray(shard.data), shard.index)
        for rows in splits:
            _record(job, partial(programs[f"record/{rows.split}"].function, params), data, rows, writer)
        found = _seal(splits, writer)
        tokens = sum(len(rows.order) for rows in splits) * data.length
        store = {split: summary.model_dump(mode="json", exclude_defaults=True) for split, summary in found.items()}
        return Result(found["train"].figures(), tokens, details={"data": data_details(data), "store": store})


@dataclass(frozen=True)
class Rows:
    """One split of the store: row i of it is row `order[i]` of the packed data."""

    split: str
    order: np.ndarray
    codec: codecs.Codec
    spec: store_format.SplitSpec


def _splits(job: Job[Record], spec: ModelSpec, data: PackedData) -> list[Rows]:
    stage = job.stage
    orders = {
        "train": row_numbers(data, order_of(job), stage.rows),
        "held_out": np.arange(data.counts["held_out"]["rows"])[: stage.held_out_rows],
    }
    splits = []
    for split, (codec, forced) in stage.kept(data.tokenizer.control_ids).items():
        arrays = codecs.layout(codec, data.length, spec.width, spec.vocab, forced)
        found = store_format.split_spec(len(orders[split]), stage.shard, arrays)
        splits.append(Rows(split, orders[split], codec, found))
    return splits


def _describe(job: Job[Record], spec: ModelSpec, data: PackedData, splits: list[Rows]) -> store_format.Description:
    stage = job.stage
    info = store_format.StoreInfo(
        codec=stage.codec.model_dump(mode="json"),
        teacher=store_format.TeacherIdentity(stage=job.source.name, digest=digest(job.source)),
        tokenizer_digest=data.tokenizer.digest,
        data_digest=data.digest,
        length=data.length,
        vocab=spec.vocab,
        width=spec.width,
        forced=data.tokenizer.control_ids,
        seed=stage.seed,
        dtype=stage.compute.dtype,
    )
    head = store_format.ArraySpec(shape=(spec.width, spec.vocab), dtype=stage.compute.dtype)
    return store_format.Description(info=info, splits={rows.split: rows.spec for rows in splits}, head=head)


def plan_batches(rows: int, shard: int, groups: int, local: int) -> list[np.ndarray]:
    """Which rows each batch holds, `[groups, local]`, -1 for none.

    A group is the processes that hold the same `local` rows of a batch. Shards go round them, so that a file is written
    by one of them alone. The plan does not depend on what is done: a row is always computed among the same others.
    """
    numbers = np.arange(rows)
    queues = [numbers[numbers // shard % groups == group] for group in range(groups)]
    steps = -(-max(map(len, queues)) // local)
    plan = np.full((groups, steps * local), -1)
    for group, queue in enumerate(queues):
        plan[group, : len(queue)] = queue
    return list(plan.reshape(groups, steps, local).swapaxes(0, 1))


def _compile(job: Job[Record], codec: codecs.Codec, forced: tuple[int, ...]) -> Any:
    """`(parameters, batch)` to what `pack` takes, each row whole on the devices that hold it."""
    placement, rules = job.placement, job.placement.rules
    model = VLM(job.spec, job.stage.compute.unrounded)
    encode = encoder(codec, placement, forced, DEFAULT_CHUNK)

    def record(params: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        states = hidden(model, params, batch)
        return encode(states, head_matrix(params), batch["loss_mask"], batch.get("uniforms"))

    by_row = NamedSharding(placement.mesh, PartitionSpec(rules.batch))
    return jax.jit(rules.scoped(record), out_shardings=by_row)


def _encoded(job: Job, encode: Encode, data: PackedData, rows: Rows, steps: list[np.ndarray]) -> Iterator[Encoded]:
    """What the teacher says of this process's rows of each step [global]."""
    own, count = job.placement.rows(job.stage.batch.sequences), job.stage.batch.sequences
    stream = chosen_rows(data, rows.split, [np.where(step >= 0, rows.order[step], -1) for step in steps], own)
    try:
        for number, (step, (batch, found)) in enumerate(zip(steps, stream, strict=True)):
            hashes = [one or bytes(HASH_BYTES) for one in found]
            draws = [codecs.uniforms(rows.codec, job.stage.seed, one, data.length) for one in hashes]
            if draws[0] is not None:
                batch = batch | {"uniforms": np.stack([u for u in draws if u is not None])}
            poll(f"{rows.split} batch {number + 1}", slow=number == 0)
            yield step[own], hashes, encode(place(job.placement, batch, count, data.vision))
    finally:
        stream.close()  # type: ignore[attr-defined]


def _record(job: Job[Record], encode: Encode, data: PackedData, rows: Rows, writer: Writer) -> None:
    """Bring all rows of a split into the store, a global batch at a time."""
    placement, count = job.placement, job.stage.batch.sequences
    owners = placement.row_owners(count)
    mine = next(i for i, (held, _) in enumerate(owners) if np.array_equal(held, placement.rows(count)))
    writes = owners[mine][1] == jax.process_index()
    done = writer.done(rows.split)
    barrier(f"what of {rows.split} is there")  # every process plans by the same, before one of them writes
    plan = plan_batches(len(rows.order), rows.spec.shard_rows, len(owners), count // len(owners))
    order = np.argsort(np.concatenate([held for held, _ in owners]))
    steps = [step.reshape(-1)[order] for step in plan if not done[step[step >= 0]].all()]
    line = ProgressLine(f"{job.name} {rows.split}", len(plan), len(plan) - len(steps))
    written, began = 0, 0.0
    try:
        encoded = _encoded(job, encode, data, rows, steps)
        # a pair: the device already works on the next batch while this one is written
        for number, (batch, _) in enumerate(pairwise(chain(encoded, [None]))):
            began = began or time.monotonic()  # what came before it was compiling
            if batch is not None and writes:
                written += _write(writer, rows, placement, done, batch)
            del batch
            speed = number * count * data.length / max(time.monotonic() - began, 1e-9)
            note = f"{speed:,.0f} tokens/s  {written * len(owners) / 1e6:,.0f} MB before compression"
            line.update(len(plan) - len(steps) + number + 1, note)
    finally:
        line.close()
    barrier(f"{rows.split} recorded")


def _write(writer: Writer, rows: Rows, placement: Placement, done: np.ndarray, batch: Encoded) -> int:
    """Write those rows of a batch that are not there; returns their bytes before compression."""
    numbers, hashes, encoded = batch
    own = np.flatnonzero((numbers >= 0) & ~done[numbers])
    local = {name: placement.local_rows(array)[own] for name, array in encoded.items()}
    order = np.argsort(placement.order(local["counted"].shape[1]))
    packed = codecs.pack(rows.codec, {name: x if name == "curve" else x[:, order] for name, x in local.items()})
    writer.write(rows.split, numbers[own], [hashes[i] for i in own], packed)
    return sum(array.nbytes for array in packed.values())


def _seal(splits: list[Rows], writer: Writer) -> dict[str, SplitSummary]:
    """Hash and summarise every file, shared out over the processes; then the store is finished."""

    def seal(rows: Rows, shards: Iterable[int]) -> list[store_format.ShardRecord]:
        records = []
        for shard in shards:
            saving()
            records.append(writer.seal_shard(rows.split, shard, partial(statistics, rows.codec)))
        return records

    for rows in splits:
        seal(rows, range(rows.spec.shards)[jax.process_index() :: jax.process_count()])
    barrier("sealed")
    records = {rows.split: seal(rows, range(rows.spec.shards)) for rows in splits}  # all are there by now
    barrier("records read")
    if is_first():
        writer.finish(records)
    barrier("store finished")
    return {rows.split: summarise(rows.codec, records[rows.split]) for rows in splits}


def recorded_teacher(job: Job[Any], recorder: Record) -> Teacher:
    """What was recorded as the teacher of another stage, `job`, with abstract arrays."""
    spec, dtype = job.graph.specs[recorder.source], recorder.compute.dtype

    def added(codec: codecs.Codec, forced: tuple[int, ...]) -> dict[str, Any]:
        stored = codecs.layout(codec, job.stage.batch.length, spec.width, spec.vocab, forced)
        one = codecs.unpack({name: np.zeros((1, *array.shape), array.dtype) for name, array in stored.items()})
        return {name: _described(job, name, array[0]) for name, array in one.items()}

    shape, kept = (spec.width, spec.vocab), recorder.kept(job.tokens.control)
    lies = job.teacher_placement.sharding(shape, ("embed", "vocab"))
    head = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=lies)
    teacher = recorded(*kept["train"], dtype, head, spec.context)
    return replace(teacher, train_arrays=added(*kept["train"]), held_out_arrays=added(*kept["held_out"]))


def _described(job: Job[Any], name: str, of_row: np.ndarray) -> jax.ShapeDtypeStruct:
    """A global batch of such arrays."""
    shape = (job.stage.batch.sequences, *of_row.shape)
    return jax.ShapeDtypeStruct(shape, of_row.dtype, sharding=job.placement.batch_sharding(name, len(shape)))
