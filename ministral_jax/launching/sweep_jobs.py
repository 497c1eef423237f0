"""Sweeps on a cluster: one job for each point, after the jobs that make what points share.

A job is `ministral-jax run` in a point's directory. Its stages are links into `shared/`, made when the jobs are
rendered; no stage is ever run by two jobs at once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from ministral_jax.launching.fit import refuse_misfit
from ministral_jax.launching.launch import SCHEDULERS, block
from ministral_jax.recipe.load import order
from ministral_jax.runs.sweep import Point, Sweep, users
from ministral_jax.runs.sweep_run import link, prepare, refresh
from ministral_jax.stages.manifest import read_manifest


class PlannedRun(NamedTuple):
    """One job: stages (all when empty) with what they need, made in a point's directory."""

    name: str
    point: Point
    stages: tuple[str, ...]
    after: str | None
    """The job that must have ended well before it begins."""

    @property
    def shared(self) -> bool:
        """Whether others wait for it."""
        return self.name.startswith("shared")


def plan(sweep: Sweep, points: Sequence[Point], done: Collection[str] = ()) -> list[PlannedRun]:
    """First what points share, one job after another, then the points, side by side.

    Args:
        done: directories of stages that are finished already; nothing is planned for them.
    """
    used, covered, last = users(points), set(done), None
    runs: list[PlannedRun] = []
    for point in points:
        stages = tuple(name for name, where in point.stages.items() if used[where] > 1 and where not in covered)
        covered.update(point.stages[name] for name in stages)
        if stages:
            runs.append(PlannedRun(f"shared-{len(runs) + 1}", point, stages, last))
            last = runs[-1].name
    for number, point in enumerate(points, 1):
        if not covered.issuperset(point.stages.values()):
            runs.append(PlannedRun(f"point-{number}", point, sweep.stages, last))
    return runs


def prepare_jobs(sweep: Sweep, sweep_dir: Path, scheduler: str) -> str:
    """Write `sweep.json` and every point's links, and render the jobs of what is not finished yet.

    Returns:
        for `slurm` a shell script that submits them, each after those it needs; for `gke` their manifests in order.

    Raises:
        UserError: see `sweep_run.prepare`; also a recipe without `launch.gke`, or one that the scheduler cannot run; a
            stage that does not fit the machine which a job asks for.
    """
    points, record = prepare(sweep, sweep_dir)
    done = [where for where in users(points) if read_manifest(sweep_dir / where) is not None]
    runs = plan(sweep, points, done)
    begin, entry = {"slurm": (_SUBMIT, _submission), "gke": (_APPLY, _manifest)}[scheduler]
    parts = [begin.format(count=len(runs), name=sweep.name)]
    for run in runs:
        job = block(run.point.recipe, scheduler, sweep.recipe, f"--jobs {scheduler}")
        made = [name for name in order(run.point.recipe, run.stages) if run.point.stages[name] not in done]
        refuse_misfit(run.point.recipe, made, job)
        overrides = [override for override in run.point.overrides if not override.startswith("launch.")]
        place = ("--run-dir", str(sweep_dir / run.point.name))
        name = _job_name(sweep, run)
        text = SCHEDULERS[scheduler].render(job, name, ("run", sweep.recipe, *run.stages, *overrides, *place))
        parts.append(f"# {run.name}: {run.point.name}\n{entry(run, name, text)}")
    sweep_dir.mkdir(parents=True, exist_ok=True)
    refresh(record, sweep_dir)
    for point in points:
        link(point, sweep_dir)
    return "".join(parts)


def _job_name(sweep: Sweep, run: PlannedRun) -> str:
    """What SLURM and Kubernetes both accept."""
    words = re.sub(r"[^a-z0-9]+", "-", sweep.name.lower()).strip("-")
    return f"{words if words[0].isalpha() else f's-{words}'}"[:26].rstrip("-") + f"-{run.name}"


_SUBMIT = """\
#!/bin/sh
# Submits the {count} jobs of sweep {name}, each after those it needs. A job that fails takes those after it along;
# the same `ministral-jax sweep` then renders what is left. When all are done: ministral-jax report SWEEP_DIRECTORY
set -eu
submit() {{
  id=$(sbatch --parsable "$@")
  id=${{id%%;*}}
}}

"""


def _submission(run: PlannedRun, name: str, script: str) -> str:
    end = "END_OF_JOB"
    while end in script.splitlines():
        end += "_"
    variable = lambda job: "job_" + job.replace("-", "_")
    options = f' --kill-on-invalid-dep=yes --dependency="afterok:${variable(run.after)}"' if run.after else ""
    keep = f"{variable(run.name)}=$id\n" if run.shared else ""
    return f"submit{options} <<'{end}'\n{script}{end}\n{keep}\n"


_APPLY = """\
# The {count} jobs of sweep {name}. A JobSet does not wait for another: create the `shared` ones in this order, each
# when the one before it is done, then all `point` ones. Their directories hold links, made when this was printed: print
# it where the volume is mounted, in the working directory of the jobs.
"""


def _manifest(run: PlannedRun, name: str, manifest: str) -> str:
    wait = f"# then: kubectl wait --for=condition=Completed --timeout=-1s jobset/{name}\n" if run.shared else ""
    return f"{wait}{manifest}---\n"
