"""What the stages that read packed rows share: settings, data, batches, and held-out evaluation of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int
from pydantic import Field, field_validator

from ministral_jax.data.batch import Batch
from ministral_jax.data.bins import batch_shapes, place
from ministral_jax.data.config import DataConfig
from ministral_jax.data.documents import Progress
from ministral_jax.data.pipeline import ENDLESS, Join, Order, batches, held_out
from ministral_jax.data.prepare import PackedData, prepare
from ministral_jax.data.sources import source_digest
from ministral_jax.data.tokenizer import check_vocab, tokenizer_digest
from ministral_jax.distributed.placement import Placement
from ministral_jax.distributed.processes import polled
from ministral_jax.errors import UserError
from ministral_jax.losses.evaluation import forward, reading, with_tower
from ministral_jax.losses.head import LossHead
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import Compute, head_of, placed_params
from ministral_jax.settings import Frozen
from ministral_jax.stages.base import Graph, Job, Program, Stage
from ministral_jax.stages.checks import check_compute
from ministral_jax.stages.manifest import read_manifest
from ministral_jax.teachers.apart import READ, TWIN
from ministral_jax.teachers.teacher import Teacher

Batches = Iterator[dict[str, Any]]


class BatchConfig(Frozen):
    """Global batch: `sequences` packed rows of `length` tokens, its gradient accumulated over `microbatches`."""

    sequences: int = Field(default=16, ge=1)
    length: int = Field(default=256, ge=2)
    microbatches: int = Field(default=1, ge=1)

    @field_validator("microbatches")
    @classmethod
    def _divides(cls, value: int, info: Any) -> int:
        if info.data.get("sequences", value) % value:
            raise ValueError(f"must divide batch.sequences = {info.data['sequences']}")
        return value

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


class EvaluateConfig(Frozen):
    """Held-out evaluation at step 0, at multiples of `every`, and at the last step."""

    every: int = Field(default=100, ge=1)
    early: bool = True
    """Also at powers of two below `every`: most is learnt in the first steps."""
    rows: int = Field(default=64, ge=1)
    """Held-out rows, in file order."""


class Packing:
    """Packed rows of the stages of a run, made once for those that read the same."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self._packed: dict[Any, PackedData] = {}
        self._digests: dict[str, str] = {}

    @property
    def used(self) -> bool:
        return bool(self._packed)

    def rows(self, job: Job[RowStage]) -> PackedData:
        """Tokenised and packed, unless that was done already."""
        stage = job.stage
        wanted = (stage.data.model_dump_json(), stage.batch.length, job.spec.vision, stage.reads_pairs)
        if wanted not in self._packed:
            self._packed[wanted] = open_data(job, self.progress)
        data = self._packed[wanted]
        self._digests[job.name] = data.digest
        check_vocab(data.tokenizer, job.spec)
        return data

    def digest(self, job: Job[Any], stage: str) -> str | None:
        """Of the rows that another stage of the run reads, or has read when it was made."""
        if stage in self._digests:
            return self._digests[stage]
        made = read_manifest(job.run_dir / stage)
        return made.data.digest if made is not None and made.data is not None else None


class RowStage(Stage):
    """A stage that reads packed rows."""

    reads_pairs: ClassVar[bool] = False
    """Whether its rows hold pairs of answers."""

    seed: int = 0
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    first_row: int | None = Field(default=None, ge=0)
    """Where the stage begins in the endless sequence of training rows of its seed; None is after what the stages it
    comes from have read of the same sequence, so that no row is read twice before every one was read."""
    compute: Compute = Compute()

    @property
    def computed(self) -> Compute:
        """How the model is computed that it makes."""
        return self.compute

    @property
    def rows_read(self) -> int:
        """Training rows, one after the other."""
        return 0

    def contents(self, root: Path) -> dict[str, str | None]:
        return data_contents(self.data, root)

    def check_sizes(self, spec: ModelSpec, graph: Graph, where: str) -> None:
        super().check_sizes(spec, graph, where)
        self.check_length(spec, where)

    def check_length(self, spec: ModelSpec, where: str) -> None:
        """Raise `UserError` when rows are longer than the model's context."""
        if self.batch.length > spec.context:
            raise UserError(f"{where}.batch.length = {self.batch.length} exceeds the model's context of {spec.context}")

    def check_mesh(self, job: Job[Any]) -> None:
        job.placement.check_batch(self.batch.sequences, self.batch.length, job.where, self.batch.microbatches)

    def prepare(self, job: Job[Any], packing: Packing) -> None:
        check_compute(job, self.batch.length)
        packing.rows(job)


def first_row(stage: Stage, stages: Mapping[str, Stage]) -> int:
    """Where a stage of a recipe begins in its sequence of training rows, which is that of every stage with the same
    data, row length and seed; see `RowStage.first_row`."""
    if not isinstance(stage, RowStage):
        return 0
    if stage.first_row is not None:
        return stage.first_row
    mine, read = _sequence(stage), 0
    for before in ancestors(stage, stages):
        if isinstance(before, RowStage) and _sequence(before) == mine:
            read += before.rows_read
            if before.first_row is not None:
                return before.first_row + read
    return read


def order_of(job: Job[Any]) -> Order:
    """In which the stage reads training rows."""
    return Order(job.stage.seed, first_row(job.stage, job.graph.stages))


def _sequence(stage: RowStage) -> tuple[Any, ...]:
    return stage.data, stage.batch.length, stage.seed, stage.reads_pairs, stage.inputs().get("pairs")


def ancestors(stage: Stage, stages: Mapping[str, Stage]) -> Iterator[Stage]:
    """What a stage comes from, the nearest first; of a cycle, which is refused elsewhere, no end."""
    seen: set[str] = set()
    while (name := stage.source) is not None and name in stages and name not in seen:
        seen.add(name)
        stage = stages[name]
        yield stage


def open_data(job: Job[RowStage], progress: Progress | None = None) -> PackedData:
    """The packed rows of the stage's length; the cascade had them made before its first stage."""
    stage = job.stage
    return prepare(stage.data, stage.batch.length, job.spec.vision, job.data_root, progress, stage.reads_pairs)


def data_contents(config: DataConfig, root: Path) -> dict[str, str | None]:
    """Digests of the tokenizer and of every source, see `Stage.contents`."""
    tokenizer = {"data.tokenizer": tokenizer_digest(config.tokenizer, root)}
    return tokenizer | {f"data.sources.{name}": source_digest(one, root) for name, one in config.sources.items()}


def data_details(data: PackedData) -> dict[str, Any]:
    """What the manifest says of the data."""
    left_out = {name: found["rows"] for name, found in data.counts["left_out"].items() if found["rows"]}
    more = {"left_out": left_out} if left_out else {}
    return {"digest": data.digest, "tokenizer_digest": data.tokenizer.digest, **more}


def train_batches(
    job: Job[RowStage],
    data: PackedData,
    start: int = 0,
    stop: int | None = None,
    join: Join | None = None,
    microbatches: int = 1,
) -> Batches:
    """Global batches of the stage, which a program splits into `microbatches`; this host reads its own rows of them,
    and what `join` adds to these."""
    count, steps = job.stage.batch.sequences, range(start, stop or ENDLESS.stop)
    rows = batches(data, count, order_of(job), steps, _rows(job, count), join)
    return _placed(job, data, rows, microbatches)


def held_out_batches(job: Job[Any], data: PackedData, join: Join | None = None) -> Batches:
    """A pass over the held-out rows, at which a job may stop."""
    count = job.stage.batch.sequences
    rows = held_out(data, count, job.stage.evaluate.rows, _rows(job, count), join)
    return polled(_placed(job, data, rows), "evaluating batch")


def _rows(job: Job[Any], count: int) -> Int[np.ndarray, " rows"]:
    """Which rows of a global batch this host reads, ascending: those of its devices, of the student or of a teacher."""
    rows = job.placement.rows(count)
    return rows if job.teacher_apart is None else np.union1d(rows, job.teacher_apart.rows(count))


def _placed(job: Job[Any], data: PackedData, rows: Iterator[Any], microbatches: int = 1) -> Batches:
    """The next batch goes to the devices, in a thread, while they work on this one; what a teacher on a mesh of its
    own reads of it, always in the stage's microbatches, goes there too, under `TWIN`."""
    given = job.stage.batch
    read = _rows(job, given.sequences)

    def put(batch: Batch, placement: Placement, parts: int) -> dict[str, Any]:
        mine = np.isin(read, placement.rows(given.sequences))
        own = {name: array if name == "image_sizes" else array[mine] for name, array in batch.items()}
        return place(placement, own, given.sequences, data.vision, parts)

    def fetch() -> dict[str, Any] | None:
        if (batch := next(rows, None)) is None:
            return None
        ours = put(batch, job.placement, microbatches)
        if job.teacher_apart is None:
            return ours
        twin = {name: batch[name] for name in (*READ, "images", "image_sizes") if name in batch}
        return ours | {TWIN: put(twin, job.teacher_apart, given.microbatches)}

    try:
        with ThreadPoolExecutor(1, "placing") as ahead:
            coming = ahead.submit(fetch)
            while (batch := coming.result()) is not None:
                coming = ahead.submit(fetch)
                yield batch
    finally:
        getattr(rows, "close", lambda: None)()


def abstract_batch(
    job: Job[Any], microbatches: int = 1, placement: Placement | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch of the stage as `train_batches` gives it, with as many pictures as it can have: shapes, dtypes and
    where they lie, by the job's placement or another one."""
    batch, floats, placement = job.stage.batch, ("loss_mask", "answer_mask", "text_bytes"), placement or job.placement
    bins, patches = placement.bins(microbatches), job.stage.data.patches
    return placement.described(batch_shapes(batch.sequences, batch.length, floats, patches, bins, job.spec.vision))


def abstract_states(job: Job[Any], spec: ModelSpec) -> jax.ShapeDtypeStruct:
    """Final states of a model of `spec` for a global batch, as the stage computes them and lays its rows."""
    shape = (job.stage.batch.sequences, job.stage.batch.length, spec.width)
    return jax.ShapeDtypeStruct(
        shape, jnp.dtype(job.stage.compute.dtype), sharding=job.placement.batch_sharding("states", 3)
    )


def evaluation_programs(
    job: Job[Any], spec: ModelSpec, teacher: Teacher | None = None, dtype: DTypeLike = jnp.float32
) -> dict[str, Program]:
    """What `losses.evaluation.make_evaluate` compiles for a model of `spec` with parameters of `dtype`: its states, and
    what is read off them."""
    placement = job.placement
    params, batch = placed_params(spec, placement, dtype), abstract_batch(job)
    batch["document"] = batch["segments"]
    run, targets = forward(spec, job.stage.computed, placement), None

    def as_rows(states: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(states.shape, states.dtype, sharding=placement.batch_sharding("states", 3))

    with jax.set_mesh(placement.mesh):
        states = as_rows(jax.eval_shape(run, params, batch))
        if teacher is not None:
            constants = with_tower(teacher.constants, params)
            theirs, _ = jax.eval_shape(teacher.held_out, constants, batch | teacher.held_out_arrays)
            targets = (as_rows(theirs), head_of(teacher.constants))
    read = reading(LossHead(placement, job.teacher_placement.rules))
    return {
        "evaluate/states": Program(run, (params, batch)),
        "evaluate/figures": Program(read, (states, head_of(params), targets, batch)),
    }
