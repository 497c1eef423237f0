"""The graph of stages, run: in order, finished ones skipped, interrupted ones resumed, lineage kept."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from pydantic import TypeAdapter

from ministral_jax.console import say
from ministral_jax.distributed.collectives import barrier, first_then_all, from_first, is_first
from ministral_jax.distributed.processes import poll, poll_alone
from ministral_jax.files import append_jsonl, is_remote, write_json
from ministral_jax.models.spec import ModelSpec
from ministral_jax.recipe.types import Recipe
from ministral_jax.runs.identity import identity
from ministral_jax.runs.survey import Planned, shelves, survey, take
from ministral_jax.stages import Graph, Job, Result, Stage
from ministral_jax.stages.manifest import digest, environment, finished
from ministral_jax.stages.rows import Packing
from ministral_jax.training.progress import ProgressLine

Jobs = Mapping[str, Job[Stage]]
_PLANS = TypeAdapter(list[Planned])


def run_cascade(
    recipe: Recipe, run_dir: Path, wanted: Iterable[str] = (), taken_from: Sequence[Path] = ()
) -> list[str]:
    """Bring the wanted stages (all but the optional ones when none is named) and what they need to `finished`.

    A finished stage is skipped, one that another run has made in the same way is taken from there; running again after
    a crash goes on where the last saved state stands.

    Args:
        taken_from: directories of other runs and of sweeps.

    Returns:
        names of the stages in the order in which they were looked at.

    Raises:
        UserError: the recipe is inconsistent, or a stage in `run_dir` was made with other settings, data or inputs.
    """
    wanted, plans = list(wanted), list[Planned]()

    def look() -> None:  # every conflict is found before anything is computed or written
        if is_first():
            plans.extend(survey(recipe, run_dir, wanted, shelves(taken_from)))
            for plan in plans:
                if plan.state == "taken":
                    take(plan, run_dir)

    first_then_all(look)
    plans = _PLANS.validate_python(from_first(_PLANS.dump_python(plans, mode="json")))
    specs = {plan.name: plan.spec for plan in plans}
    jobs = {plan.name: make_job(recipe, plan.name, specs, run_dir) for plan in plans if plan.is_made}
    opening(run_dir, plans)
    for job in jobs.values():
        job.stage.check_mesh(job)
    first_then_all(lambda: _prepare(jobs, run_dir))  # so is every fault of the data
    if is_first():
        write_json(run_dir / "recipe.json", recipe.dump())
    for position, plan in enumerate(plans, 1):
        at = f"[{position}/{len(plans)}] {plan.name}"
        if not plan.is_made:
            found = "finished already" if plan.state == "finished" else f"taken from {_origin(plan.place)}"
            _say(f"{at}: {found}")
            continue
        goes_on = f", goes on from step {plan.step}" if plan.step is not None else ""
        _say(f"{at}: {recipe.stages[plan.name].do}{goes_on}")
        _run_stage(jobs[plan.name], plan.identity["contents"])
    return list(specs)


def opening(run_dir: Path, plans: Sequence[Planned]) -> None:
    """One line: where, on what, and what is there already."""
    states = Counter(plan.state for plan in plans)
    parts = [f"{sum(plan.is_made for plan in plans)} of {len(plans)} stages to make"]
    parts += [f"{states[state]} {state}" for state in ("resumes", "grows", "finished", "taken") if states[state]]
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    _say(f"{run_dir.absolute()}: {', '.join(parts)}; on {devices}")


def _say(text: str) -> None:
    if is_first():
        say(text)


def _origin(place: Path) -> str:
    return str(place) if is_remote(place) else os.path.relpath(os.path.realpath(place))


def make_job(recipe: Recipe, name: str, specs: Mapping[str, ModelSpec], run_dir: Path) -> Job[Stage]:
    """A stage on the devices that there are."""
    stage = recipe.stages[name]
    meshes = stage.meshes(jax.devices(), f"stages.{name}")
    return Job(name, stage, specs[name], Graph(recipe.stages, specs), run_dir, *meshes)


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


def _run_stage(job: Job[Stage], contents: Mapping[str, str | None]) -> None:
    job.directory.mkdir(exist_ok=True)
    if is_first():
        (job.directory / "manifest.json").unlink(missing_ok=True)  # of one that is to get more steps
        made_of = identity(job.stage, job.spec, contents) | {"inputs": _inputs(job)}
        write_json(job.directory / "stage.json", made_of)
    job = with_norms_of_source(job)
    begun = time.monotonic()
    poll(f"beginning {job.name}", slow=True)
    with jax.set_mesh(job.mesh):
        result = job.stage.run(job)
    if is_first():
        write_json(job.directory / "manifest.json", _manifest(job, result, time.monotonic() - begun))
    barrier(f"{job.name} finished")


def _inputs(job: Job[Stage]) -> dict[str, dict[str, str]]:
    roles = job.stage.inputs().items()
    return {role: {"stage": other, "digest": digest(job.run_dir / other)} for role, other in roles}


def _manifest(job: Job[Stage], result: Result, seconds: float) -> dict[str, Any]:
    stage = job.stage
    return {
        "stage": job.name,
        "do": stage.do,
        "status": "finished",
        "config": stage.model_dump(mode="json", by_alias=True),
        "spec": (result.spec or job.spec).model_dump(mode="json"),
        "inputs": _inputs(job),
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
