"""The graph of stages, run: in order, finished ones skipped, interrupted ones resumed, lineage kept."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from pydantic import TypeAdapter, ValidationError

from ministral_jax.config import (
    AnyStage,
    DataStage,
    DistillStage,
    OnlineStage,
    PruneStage,
    Recipe,
    RecordStage,
    RewardStage,
    SFTStage,
    Stage,
    StoredTeacher,
)
from ministral_jax.data.pipeline import PackedData, check_vocab, prepare
from ministral_jax.distributed.collectives import barrier, first_then_all, is_first
from ministral_jax.distributed.placement import Placement, make_mesh
from ministral_jax.distributed.processes import poll, poll_alone
from ministral_jax.errors import UserError
from ministral_jax.files import append_jsonl, write_json
from ministral_jax.models.spec import ModelSpec
from ministral_jax.recipe.load import inputs, order, resolve_specs
from ministral_jax.stages import Job, Result, verb
from ministral_jax.stages.manifest import digest, environment, finished, read_manifest
from ministral_jax.stages.online import check_prompts, check_rows
from ministral_jax.stages.reward import check_pairs
from ministral_jax.teachers.codecs import check as check_codec
from ministral_jax.training.metrics import ProgressLine


def run_cascade(recipe: Recipe, run_dir: Path, wanted: Iterable[str] = ()) -> list[str]:
    """Bring the wanted stages (all but the optional ones when none is named) and what they need to `finished`.

    A finished stage is skipped; running again after a crash goes on where the last saved state stands.

    Returns:
        names of the stages in the order in which they were looked at.

    Raises:
        UserError: the recipe is inconsistent, or a stage in `run_dir` was made with other settings or another parent.
    """
    names = order(recipe, wanted)
    specs = resolve_specs(recipe, names)
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in names:  # every conflict is found before anything is computed or written
        _check_unchanged(recipe, run_dir, name, specs[name])
    pending = [name for name in names if read_manifest(run_dir / name) is None]
    for name in pending:
        _check_mesh(recipe, name)
    first_then_all(lambda: _pack_data(recipe, run_dir, pending, specs))  # so is every fault of the data
    if is_first():
        write_json(run_dir / "recipe.json", recipe.dump())
    for position, name in enumerate(names, 1):
        if read_manifest(run_dir / name) is not None:
            _say(f"[{position}/{len(names)}] {name}: finished already")
            continue
        _say(f"[{position}/{len(names)}] {name}: {recipe.stages[name].do}")
        _run_stage(recipe, run_dir, name, specs)
    return names


def _check_mesh(recipe: Recipe, name: str) -> None:
    stage = recipe.stages[name]
    placement = Placement(make_mesh(stage.mesh), stage.sharding)
    if isinstance(stage, DataStage):
        batch = stage.batch
        placement.check_batch(batch.sequences, batch.length, f"stages.{name}", batch.microbatches)
    if isinstance(stage, OnlineStage):
        check_rows(stage, placement, f"stages.{name}")


def _pack_data(recipe: Recipe, run_dir: Path, names: list[str], specs: dict[str, ModelSpec]) -> None:
    """Tokenise and pack what the stages will read, unless that was done already; once for those that read the same."""
    packed: dict[Any, PackedData] = {}
    of_stage: dict[str, PackedData] = {}
    begun, line = time.monotonic(), ProgressLine("data", 0)

    def progress(what: str, so_far: int) -> None:
        poll_alone(f"packing data: {what}")
        line.count(what, so_far)

    try:
        for name in names:
            stage, spec = recipe.stages[name], specs[name]
            if isinstance(stage, OnlineStage):
                check_prompts(stage, spec, run_dir / "data", f"stages.{name}", progress)
            if isinstance(stage, SFTStage) and stage.generate is not None:
                check_prompts(stage, spec, run_dir / "data", f"stages.{name}", progress)
            if isinstance(stage, RewardStage):
                check_pairs(stage, spec, run_dir / "data", f"stages.{name}", progress)
            if not isinstance(stage, DataStage):
                continue
            wanted = (stage.data.model_dump_json(), stage.batch.length, spec.vision)
            if wanted not in packed:
                packed[wanted] = prepare(stage.data, stage.batch.length, spec.vision, run_dir / "data", progress)
            of_stage[name] = packed[wanted]
            check_vocab(packed[wanted].tokenizer, spec)
            _check_store(recipe, run_dir, name, spec, of_stage)
    finally:
        line.close()
    if packed and is_first():
        spent = round(time.monotonic() - begun, 3)
        append_jsonl(run_dir / "ledger.jsonl", {"what": "data", "seconds": spent})


def _check_store(recipe: Recipe, run_dir: Path, name: str, spec: ModelSpec, data: dict[str, PackedData]) -> None:
    """A store must have room for its entries, and a student must read the rows that will be in it."""
    stage, where = recipe.stages[name], f"stages.{name}"
    if isinstance(stage, RecordStage):
        try:
            check_codec(stage.codec, spec.vocab, data[name].tokenizer.control_ids)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if isinstance(stage, (DistillStage, SFTStage)) and isinstance(stage.teacher, StoredTeacher):
        recorder = stage.teacher.store
        made = read_manifest(run_dir / recorder)
        known = made.data.digest if made is not None and made.data is not None else None
        recorded = data[recorder].digest if recorder in data else known
        if recorded != data[name].digest:
            raise UserError(
                f"{where}.data differs from that of {recorder!r}, whose rows are recorded; both must have the same "
                "sources, tokenizer, held_out and patches"
            )


def _say(text: str) -> None:
    if is_first():
        print(text, file=sys.stderr, flush=True)


_ON_THE_WAY = {"checkpoint", "guard", "mesh", "sharding", "teacher_sharding", "optional", "workers"}


def identity(recipe: Recipe, name: str, spec: ModelSpec) -> dict[str, Any]:
    """The settings that make a stage's result what it is; where it is computed and how it survives do not."""
    return _identity(recipe.stages[name], spec)


def _identity(stage: Stage, spec: ModelSpec) -> dict[str, Any]:
    config = stage.model_dump(mode="json", by_alias=True, exclude=_ON_THE_WAY)
    return {"config": config, "spec": spec.model_dump(mode="json")}


def _check_unchanged(recipe: Recipe, run_dir: Path, name: str, spec: ModelSpec) -> None:
    """A directory holds the result of one setting; another setting, or another parent, is an error, not a surprise."""
    directory = run_dir / name
    begun = _read_begun(directory)
    if begun is not None:
        wanted = identity(recipe, name, spec)
        for change in _differences({key: begun.get(key) for key in wanted}, wanted):
            raise UserError(
                f"stage {name!r} in {run_dir} was begun with other settings: {change}; "
                f"give another --run-dir, or delete {directory} (and the stages made from it)"
            )
    manifest = read_manifest(directory)
    for role, other in (manifest.inputs if manifest else {}).items():
        if read_manifest(run_dir / other.stage) is None or digest(run_dir / other.stage) != other.digest:
            raise UserError(
                f"stage {name!r} in {run_dir} was made from another {role} {other.stage!r} than the one there now; "
                f"delete {directory} to make it again"
            )


def _read_begun(directory: Path) -> dict[str, Any] | None:
    """The identity of the stage that a directory was begun with; settings that it did not know have their defaults."""
    path = directory / "stage.json"
    if not path.is_file():
        return None
    begun = json.loads(path.read_text(encoding="utf-8"))
    try:
        stage: Any = TypeAdapter(AnyStage).validate_python(begun["config"])
        return _identity(stage, ModelSpec.model_validate(begun["spec"]))
    except (ValidationError, KeyError):
        return begun


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    return [] if old == new else [f"{path} was {old!r}, now {new!r}"]


def _run_stage(recipe: Recipe, run_dir: Path, name: str, specs: dict[str, ModelSpec]) -> None:
    stage, directory = recipe.stages[name], run_dir / name
    directory.mkdir(exist_ok=True)
    if is_first():
        write_json(directory / "stage.json", identity(recipe, name, specs[name]))
    job = Job(name=name, stage=stage, spec=_with_norms_of_source(recipe, run_dir, name, specs[name]), run_dir=run_dir)
    begun = time.monotonic()
    poll(f"beginning {name}", slow=True)
    with jax.set_mesh(job.placement.mesh):
        result: Result = verb(stage)(job)
    if is_first():
        write_json(directory / "manifest.json", _manifest(job, result, time.monotonic() - begun))
    barrier(f"{name} finished")


def _manifest(job: Job, result: Result, seconds: float) -> dict[str, Any]:
    stage, run_dir = job.stage, job.run_dir
    return {
        "stage": job.name,
        "do": stage.do,
        "status": "finished",
        "config": stage.model_dump(mode="json", by_alias=True),
        "spec": (result.spec or job.spec).model_dump(mode="json"),
        "inputs": {role: {"stage": other, "digest": digest(run_dir / other)} for role, other in inputs(stage).items()},
        "tokens": result.tokens,
        "steps": result.steps,
        "seconds": round(result.seconds or seconds, 3),
        "metrics": result.metrics,
        "files": result.files,
        "devices": {"count": jax.device_count(), "kind": jax.devices()[0].device_kind, "hosts": jax.process_count()},
        **result.details,
        **environment(),
    }


def _with_norms_of_source(recipe: Recipe, run_dir: Path, name: str, spec: ModelSpec) -> ModelSpec:
    """Exact surgery scales the norms' epsilon by a factor known only afterwards; what is made from it keeps that."""
    stage = recipe.stages[name]
    if stage.source is None or isinstance(stage, PruneStage):
        return spec
    return spec.model_copy(update={"norm_eps": finished(run_dir / stage.source).spec.norm_eps})
