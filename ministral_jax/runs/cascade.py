"""The graph of stages, run: in order, finished ones skipped, interrupted ones resumed, lineage kept."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from pydantic import TypeAdapter, ValidationError

from ministral_jax.distributed.collectives import barrier, first_then_all, is_first
from ministral_jax.distributed.placement import make_mesh
from ministral_jax.distributed.processes import poll, poll_alone
from ministral_jax.errors import UserError
from ministral_jax.files import append_jsonl, write_json
from ministral_jax.models.spec import ModelSpec
from ministral_jax.recipe.load import order, resolve_specs
from ministral_jax.recipe.types import AnyStage, Recipe
from ministral_jax.stages import Graph, Job, Result, Stage
from ministral_jax.stages.manifest import digest, environment, finished, read_manifest
from ministral_jax.stages.rows import Packing
from ministral_jax.training.progress import ProgressLine

Jobs = Mapping[str, Job[Stage]]


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
        _check_unchanged(recipe.stages[name], specs[name], run_dir / name)
    jobs = {name: make_job(recipe, name, specs, run_dir) for name in names if read_manifest(run_dir / name) is None}
    for job in jobs.values():
        job.stage.check_mesh(job)
    first_then_all(lambda: _prepare(jobs, run_dir))  # so is every fault of the data
    if is_first():
        write_json(run_dir / "recipe.json", recipe.dump())
    for position, name in enumerate(names, 1):
        if name not in jobs:
            _say(f"[{position}/{len(names)}] {name}: finished already")
            continue
        _say(f"[{position}/{len(names)}] {name}: {recipe.stages[name].do}")
        _run_stage(jobs[name])
    return names


def make_job(recipe: Recipe, name: str, specs: Mapping[str, ModelSpec], run_dir: Path) -> Job[Stage]:
    """A stage on the devices that there are."""
    stage = recipe.stages[name]
    return Job(name, stage, specs[name], Graph(recipe.stages, specs), run_dir, make_mesh(stage.mesh))


def _prepare(jobs: Jobs, run_dir: Path) -> None:
    """Pack what the stages will read, unless that was done already, and find every fault of it."""
    begun, line = time.monotonic(), ProgressLine("data", 0)

    def progress(what: str, so_far: int) -> None:
        poll_alone(f"packing data: {what}")
        line.count(what, so_far)

    packing = Packing(progress)
    try:
        for job in jobs.values():
            job.stage.prepare(job, packing)
    finally:
        line.close()
    if packing.used and is_first():
        spent = round(time.monotonic() - begun, 3)
        append_jsonl(run_dir / "ledger.jsonl", {"what": "data", "seconds": spent})


def _say(text: str) -> None:
    if is_first():
        print(text, file=sys.stderr, flush=True)


def identity(stage: Stage, spec: ModelSpec) -> dict[str, Any]:
    """The settings that make a stage's result what it is; where it is computed and how it survives do not."""
    config = stage.model_dump(mode="json", by_alias=True, exclude=set(stage.incidental))
    return {"config": config, "spec": spec.model_dump(mode="json")}


def _check_unchanged(stage: Stage, spec: ModelSpec, directory: Path) -> None:
    """A directory holds the result of one setting; another setting, or another parent, is an error, not a surprise."""
    name, run_dir = directory.name, directory.parent
    begun = _read_begun(directory)
    if begun is not None:
        wanted = identity(stage, spec)
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
        return identity(stage, ModelSpec.model_validate(begun["spec"]))
    except (ValidationError, KeyError):
        return begun


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    return [] if old == new else [f"{path} was {old!r}, now {new!r}"]


def _run_stage(job: Job[Stage]) -> None:
    job.directory.mkdir(exist_ok=True)
    if is_first():
        write_json(job.directory / "stage.json", identity(job.stage, job.spec))
    job = with_norms_of_source(job)
    begun = time.monotonic()
    poll(f"beginning {job.name}", slow=True)
    with jax.set_mesh(job.mesh):
        result = job.stage.run(job)
    if is_first():
        write_json(job.directory / "manifest.json", _manifest(job, result, time.monotonic() - begun))
    barrier(f"{job.name} finished")


def _manifest(job: Job[Stage], result: Result, seconds: float) -> dict[str, Any]:
    stage, run_dir = job.stage, job.run_dir
    return {
        "stage": job.name,
        "do": stage.do,
        "status": "finished",
        "config": stage.model_dump(mode="json", by_alias=True),
        "spec": (result.spec or job.spec).model_dump(mode="json"),
        "inputs": {role: {"stage": other, "digest": digest(run_dir / other)} for role, other in stage.inputs().items()},
        "tokens": result.tokens,
        "steps": result.steps,
        "seconds": round(result.seconds or seconds, 3),
        "metrics": result.metrics,
        "files": result.files,
        "devices": _devices(),
        **result.details,
        **environment(),
    }


def _devices() -> dict[str, Any]:
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    kind = jax.devices()[0].device_kind
    return {"count": jax.device_count(), "kind": kind, "hosts": jax.process_count(), "peak_memory": peak}


def with_norms_of_source(job: Job[Stage]) -> Job[Stage]:
    """Exact surgery scales the norms' epsilon by a factor known only afterwards; what is made from it keeps that."""
    if job.stage.source is None or job.stage.prunes:
        return job
    norm_eps = finished(job.source).spec.norm_eps
    return replace(job, spec=job.spec.model_copy(update={"norm_eps": norm_eps}))
