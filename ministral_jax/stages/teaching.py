"""Who teaches a stage: a model that runs beside the student, or what a record stage has written of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from pydantic import Discriminator, Tag

from ministral_jax.data.prepare import PackedData
from ministral_jax.distributed.handing import handed, shared_out
from ministral_jax.distributed.placement import make_mesh
from ministral_jax.errors import UserError
from ministral_jax.losses.chunked import LossOptions
from ministral_jax.losses.evaluation import hidden, with_features
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.targets import Targets, check_options
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, head_matrix, head_of, param_shardings, placed_params
from ministral_jax.settings import Frozen
from ministral_jax.stages.base import Graph, Job, Params, load_stage
from ministral_jax.stages.looped import FROZEN, Looped
from ministral_jax.stages.manifest import digest, finished
from ministral_jax.stages.record import Record, recorded_teacher
from ministral_jax.stages.rows import Packing, abstract_states
from ministral_jax.teachers.apart import Apart, TeacherMesh, states_program
from ministral_jax.teachers.store import Store
from ministral_jax.teachers.teacher import Teacher, from_states, online, stored
from ministral_jax.training.state import LossFn


class StoredTeacher(Frozen):
    """A teacher whose distribution a record stage has written."""

    store: str
    """The record stage."""


def _kind_of_teacher(value: Any) -> str:
    return "str" if isinstance(value, str) else "StoredTeacher"


AnyTeacher = Annotated[
    Annotated[str, Tag("str")] | Annotated[StoredTeacher, Tag("StoredTeacher")], Discriminator(_kind_of_teacher)
]
"""A stage's name, or `{store: the record stage}`."""


class Taught(Looped):
    """A stage that may learn from a teacher. The vision tower is frozen."""

    teacher: AnyTeacher | None = None
    teacher_mesh: TeacherMesh | None = None
    """A mesh that the teacher has for itself; None: it runs within the student's step. Its head lies on the student's
    mesh, so that KL is exact."""
    loss: LossOptions = LossOptions()
    beyond_teacher: Literal["refuse", "mask", "labels"] = "refuse"
    """Of rows longer than the teacher's context: refuse them, leave positions beyond it out of the loss, or learn the
    labels there, by cross-entropy. What a model says beyond its context is no target."""

    @property
    def teacher_stage(self) -> str | None:
        """The stage that the targets come from: the teacher itself, or the one that recorded it."""
        return self.teacher.store if isinstance(self.teacher, StoredTeacher) else self.teacher

    def inputs(self) -> dict[str, str]:
        needed = super().inputs()
        if (teacher := self.teacher_stage) is not None and teacher != self.source:
            needed["teacher"] = teacher
        return needed

    def check_sizes(self, spec: ModelSpec, graph: Graph, where: str) -> None:
        super().check_sizes(spec, graph, where)
        if self.teacher_mesh is not None and not isinstance(self.teacher, str):
            found = "no teacher" if self.teacher is None else f"a stored one, {self.teacher.store!r}"
            raise UserError(f"{where}.teacher_mesh is for a teacher that runs beside the student; there is {found}")
        if (name := self.teacher_stage) is None:
            return
        teacher = graph.stages[name]
        if self.teacher == name and isinstance(teacher, Record):
            raise UserError(f"{where}.teacher = {name!r} is a record stage; write it as {{store: {name}}}")
        if self.teacher == name and not teacher.makes_model:
            raise UserError(f"{where}.teacher = {name!r} must be a stage that makes a model")
        if self.teacher != name:
            if not isinstance(teacher, Record):
                raise UserError(
                    f"{where}.teacher.store = {name!r} must be a record stage; a model is named as `teacher: {name}`"
                )
            try:
                check_options(self.loss, teacher.codec.kind)
            except UserError as error:
                raise UserError(f"{where}.{error}") from None
            teacher.check_reader(self, name, graph.stages, where)
        check_vocabulary(spec, name, "teacher", graph, where)
        if self.beyond_teacher == "refuse" and self.batch.length > graph.specs[name].context:
            raise UserError(
                f"{where}.batch.length = {self.batch.length} exceeds the context of {graph.specs[name].context} of its "
                f"teacher {name!r}; set {where}.beyond_teacher to `labels` (cross-entropy there) or `mask` (nothing), "
                "or use shorter rows"
            )

    def meshes(self, devices: list[Any], where: str) -> tuple[Mesh, Mesh | None]:
        if (own := self.teacher_mesh) is None:
            return super().meshes(devices, where)
        ours, theirs = devices, devices
        if own.devices is not None:
            ours, theirs = shared_out(devices, own.devices, f"{where}.teacher_mesh.devices")
        return make_mesh(self.mesh, ours, f"{where}.mesh"), make_mesh(own, theirs, f"{where}.teacher_mesh")

    def check_mesh(self, job: Job[Any]) -> None:
        super().check_mesh(job)
        if (own := job.teacher_apart) is not None:
            batch = self.batch
            own.check_batch(batch.sequences, batch.length, job.where, batch.microbatches, "teacher_mesh")

    def prepare(self, job: Job[Any], packing: Packing) -> None:
        """A student must read the rows that are, or will be, in the store."""
        super().prepare(job, packing)
        if isinstance(self.teacher, StoredTeacher):
            recorder = self.teacher.store
            if packing.digest(job, recorder) != packing.digest(job, job.name):
                raise UserError(
                    f"{job.where}.data differs from that of {recorder!r}, whose rows are recorded; both must have the "
                    "same sources, tokenizer, held_out and patches"
                )


def check_vocabulary(spec: ModelSpec, name: str, role: str, graph: Graph, where: str) -> None:
    """Raise `UserError` when another stage's model knows other tokens."""
    if (theirs := graph.specs[name].vocab) != spec.vocab:
        raise UserError(
            f"{where}: its vocabulary of {spec.vocab} differs from the {theirs} of {role} {name!r}; "
            "both need the same one"
        )


@dataclass(frozen=True)
class Beyond:
    """What is learnt at positions from the teacher's `context` on: the labels, or nothing."""

    context: int
    labels: bool


def distillation(
    student: VLM,
    options: LossOptions,
    heads: LossHead,
    targets: Callable[[Params, dict[str, Any]], Targets],
    beyond: Beyond | None = None,
) -> LossFn:
    """The objective: `(trainable, frozen, batch)`, with the teacher's arrays under `frozen["teacher"]`, of which and of
    the batch `targets` makes what to learn; `beyond` its context where rows are longer than that."""

    def loss(params: Params, frozen: Params, batch: dict[str, Any]) -> Any:
        constants, counted, labels = dict(frozen), batch["loss_mask"], batch["labels"]
        theirs = constants.pop("teacher")
        if "vision" in constants and "vision" not in theirs:  # see `sharing_tower`
            batch = with_features(student, constants, batch)
        with jax.named_scope("teacher"):
            taught = targets(theirs, batch)
        states, head = hidden(student, {**params, **constants}, batch), head_matrix(params)
        mask = counted if beyond is None else counted * (batch["positions"] < beyond.context)
        total, metrics = heads.distillation_loss(states, head, taught, labels, mask, options)
        if beyond is not None and beyond.labels:
            more, found = heads.cross_entropy(states, head, labels, counted - mask, options.chunk)
            total, metrics = total + more, {**metrics, "ce_beyond_teacher": found["ce"]}
            mask = counted
        return total, {**metrics, "loss": (total, mask.sum())}

    return loss


def teacher_loss(job: Job[Any], teacher: Teacher) -> LossFn:
    """`distillation` as the stage's settings say."""
    stage: Taught = job.stage
    heads = LossHead(job.placement, job.teacher_placement.rules)
    longer = stage.batch.length > teacher.context
    beyond = Beyond(teacher.context, stage.beyond_teacher == "labels") if longer else None
    return distillation(VLM(job.spec, stage.computed), stage.loss, heads, teacher.targets, beyond)


def described_teacher(job: Job[Any]) -> Teacher:
    """The stage's teacher with abstract arrays: all that its programs need."""
    stage: Taught = job.stage
    name = stage.teacher_stage
    assert name is not None
    recorder = job.graph.stages[name]
    if isinstance(recorder, Record):
        return recorded_teacher(job, recorder)
    spec, placement = job.graph.specs[name], job.teacher_placement
    dtype = jnp.dtype(stage.compute.dtype)
    params = placed_params(spec, placement, dtype)
    if (own := job.teacher_apart) is not None:
        return from_states(
            spec, head_of(params), abstract_states(job, spec), _programs(job, spec, placed_params(spec, own, dtype))
        )
    if spec.vision == job.spec.vision:  # as will be found, but where a stage between them has trained the tower
        params = without_tower(params)
    return online(spec, params, stage.compute, placement, stage.batch.length)


def without_tower(params: Params) -> Params:
    return {part: tree for part, tree in params.items() if part not in FROZEN}


def sharing_tower(job: Job[Any], teacher: Teacher, params: Params) -> Teacher:
    """The teacher, without a tower of its own where the student's, which stays frozen, equals it to the last bit: then
    the pictures of a batch are seen once for both."""
    name, ours = job.stage.teacher_stage, {part: params[part] for part in FROZEN if part in params}
    theirs = {part: teacher.constants[part] for part in FROZEN if part in teacher.constants}
    if not theirs or job.graph.specs[name].vision != job.spec.vision:
        return teacher

    def equal(ours: Params, theirs: Params) -> jax.Array:
        found = jax.tree.map(lambda a, b: jnp.all(a.astype(b.dtype) == b), ours, theirs)
        return jnp.all(jnp.stack(jax.tree.leaves(found)))

    if not jax.jit(equal, out_shardings=job.placement.replicated)(ours, theirs):
        return teacher
    return replace(teacher, constants=without_tower(teacher.constants))


def open_teacher(job: Job[Any], data: PackedData) -> Teacher:
    """The stage's teacher: a model beside the student, or what was recorded of one. Raises `UserError`: it was
    trained on other token ids, which would teach noise; or a store that does not fit."""
    stage: Taught = job.stage
    directory, placement, ours = _teacher_directory(job), job.teacher_placement, data.tokenizer.digest
    made = finished(directory).data
    if made is not None and (taught := made.tokenizer_digest) != ours:
        raise UserError(
            f"{job.where}.data.tokenizer has digest {ours[:12]}, teacher {directory.name!r} was trained with "
            f"{taught[:12]}; both must use the same vocabulary"
        )
    if isinstance(stage.teacher, StoredTeacher):
        recorder = job.run_dir / stage.teacher.store
        store = Store(finished(recorder).config["store"] or str(recorder / "store"))
        store.check(
            teacher_digest=digest(directory),
            tokenizer_digest=ours,
            data_digest=data.digest,
            length=data.length,
            vocab=job.spec.vocab,
        )
        return stored(store, placement, job.graph.specs[stage.teacher.store].context)
    # In the dtype it computes in: the parameters would be cast to that at every use.
    dtype = jnp.dtype(stage.compute.dtype)
    if (own := job.teacher_apart) is not None:
        spec, params = load_stage(directory, dtype, own)
        head = jax.tree.map(handed, head_of(params), head_of(param_shardings(spec, placement)))
        return from_states(spec, head, abstract_states(job, spec), _programs(job, spec, params))
    spec, params = load_stage(directory, dtype, placement)
    return online(spec, params, stage.compute, placement, stage.batch.length)


def _programs(job: Job[Any], spec: ModelSpec, params: Params) -> Apart:
    """Of a teacher with a mesh of its own; its arrays may be abstract."""
    stage, own = job.stage, job.teacher_apart
    assert own is not None
    read = states_program(spec, stage.compute, own, job.placement, stage.batch.microbatches)
    return Apart(read, params, own, job.placement)


def _teacher_directory(job: Job[Any]) -> Path:
    """The finished stage whose model teaches."""
    directory = job.run_dir / job.stage.teacher_stage
    return directory if isinstance(job.stage.teacher, str) else job.run_dir / finished(directory).config["from"]


def vision_of_teacher(job: Job[Any], teacher: Teacher, params: Params) -> Params:
    """Fresh parameters around the teacher's vision tower, which a student keeps."""
    shardings = param_shardings(job.spec, job.placement)
    lender, lent = teacher.constants, [part for part in FROZEN if part in params]
    if teacher.apart is not None:
        lender = teacher.apart.params
    if any(part not in lender for part in lent):
        lender = load_stage(_teacher_directory(job), jnp.dtype(job.stage.compute.dtype), job.teacher_placement)[1]
    lend = lambda taught, ours, sharding: jax.device_put(handed(taught, sharding).astype(ours.dtype), sharding)
    return params | {part: jax.tree.map(lend, lender[part], params[part], shardings[part]) for part in lent}
