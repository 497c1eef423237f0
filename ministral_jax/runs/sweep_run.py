"""Sweeps, run: every point a run directory, every stage once, the figures of all points in one table.

    runs/<sweep>/
      sweep.json                 points, their settings, where their stages lie, what failed, figures
      shared/<stage>-<hash>/     every stage, named by what it is made of; shared/data the packed rows
      <point>/                   a run directory whose stages are links into shared/

The cascade runs in a point's directory as in any other: what another point has made is a finished stage there. So a
sweep that was killed, or is given another value, goes on with what is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from ministral_jax.console import say
from ministral_jax.errors import UserError
from ministral_jax.files import write_json
from ministral_jax.runs.cascade import run_cascade
from ministral_jax.runs.run import cache_compilations, opened
from ministral_jax.runs.summary import write_summary
from ministral_jax.runs.survey import refuse_gone, shelves
from ministral_jax.runs.sweep import Measured, Point, Sweep, SweepRecord, describe, expand
from ministral_jax.stages import verbs
from ministral_jax.stages.manifest import Manifest, read_manifest


def run_sweep(
    sweep: Sweep, sweep_dir: Path, taken_from: Sequence[Path] = (), finish: Callable[[], None] = lambda: None
) -> int:
    """Run every point, one after another, and keep `sweep.json`.

    A point that fails for a fault of its settings is recorded and the others go on; anything else, a preemption or
    Ctrl-C among it, ends the sweep at once and the same command goes on from there.

    Args:
        taken_from: directories of runs and of other sweeps, whose stages are used where they are the same.
        finish: called at the end, while nobody else may write in the directory.

    Returns:
        exit code: 0, or 1 when a point failed.

    Raises:
        UserError: the sweep or a point's recipe is wrong, before anything is written.
    """
    points, record = prepare(sweep, sweep_dir)
    shelves(taken_from)
    broken: dict[str, str] = {}
    with opened(sweep_dir):
        refresh(record, sweep_dir)
        cache_compilations(sweep_dir / "xla")
        for position, point in enumerate(points, 1):
            say(f"point [{position}/{len(points)}] {point.name}")
            link(point, sweep_dir)
            point.error = _run_point(point, sweep, sweep_dir, broken, taken_from)
            if point.error is not None:
                say(f"point {point.name} failed: {point.error}")
            refresh(record, sweep_dir)
        if failed := [point.name for point in points if point.error is not None]:
            say(f"ministral-jax: {len(failed)} of {len(points)} points failed: {', '.join(failed)}")
        finish()
    return 1 if failed else 0


def prepare(sweep: Sweep, sweep_dir: Path) -> tuple[list[Point], SweepRecord]:
    """Check everything that can be checked; nothing is written.

    Raises:
        UserError: see `expand` and `measured`; or `sweep_dir` holds something else.
    """
    points = expand(sweep)
    record = describe(sweep, points)
    if (sweep_dir / "recipe.json").exists():
        raise UserError(f"{sweep_dir} is the directory of a single run; give the sweep another --name or --run-dir")
    for point in points:
        for place in (sweep_dir / point.name / name for name in (*point.stages, "data")):
            if place.exists() and not place.is_symlink():
                raise UserError(f"{place} was not made by a sweep (it is no link); delete it or give another --run-dir")
    return points, record


def link(point: Point, sweep_dir: Path) -> None:
    """Make the point's run directory: its stages, and its packed data, are links to where they are shared."""
    for name, target in {**point.stages, "data": "shared/data"}.items():
        refuse_gone(sweep_dir / target)
        (sweep_dir / target).mkdir(parents=True, exist_ok=True)
        place, wanted = sweep_dir / point.name / name, os.path.join("..", target)
        place.parent.mkdir(exist_ok=True)
        if place.is_symlink() and os.readlink(place) == wanted:
            continue
        temporary = place.with_name(place.name + ".tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(wanted)
        os.replace(temporary, place)


def _run_point(
    point: Point, sweep: Sweep, sweep_dir: Path, broken: dict[str, str], taken_from: Sequence[Path]
) -> str | None:
    """None, or why the point failed. `broken` remembers stages that failed, so that no other point tries them again."""
    for name, where in point.stages.items():
        if where in broken:
            return f"stage {name!r} failed in point {broken[where]}, which shares it"
    run_dir = sweep_dir / point.name
    try:
        run_cascade(point.recipe, run_dir, sweep.stages, taken_from)
    except UserError as error:
        pending = [(name, where) for name, where in point.stages.items() if _manifest(run_dir / name) is None]
        if pending and (run_dir / pending[0][0] / "stage.json").is_file():  # it had begun: the fault is not the data's
            broken[pending[0][1]] = point.name
        return str(error)
    write_summary(point.recipe, run_dir)
    return None


def _manifest(directory: Path) -> Manifest | None:
    try:
        return read_manifest(directory)
    except UserError:
        return None


def read_record(sweep_dir: Path) -> SweepRecord:
    """`sweep.json` as it stands.

    Raises:
        UserError: not a sweep's directory.
    """
    try:
        return SweepRecord.model_validate_json((sweep_dir / "sweep.json").read_bytes())
    except (OSError, ValidationError):
        raise UserError(f"{sweep_dir} is not a sweep: it has no readable sweep.json") from None


def refresh(record: SweepRecord, sweep_dir: Path) -> SweepRecord:
    """Fill in, in place, what the stages say by now, and write `sweep.json`."""
    manifests: dict[str, Manifest | None] = {}
    for where in {where for point in record.points for where in point.stages.values()}:
        manifests[where] = _manifest(sweep_dir / where)
    for point in record.points:
        made = {name: manifests[where] for name, where in point.stages.items()}
        if all(made.values()):
            point.state, point.error = "finished", None
        else:
            point.state = "unfinished" if point.error is None else "failed"
        point.figures = {measure.stage: _figures(measure, made[measure.stage]) for measure in record.measure}
    record.seconds = round(sum(manifest.seconds for manifest in manifests.values() if manifest), 1)
    write_json(sweep_dir / "sweep.json", record.model_dump())
    return record


def _figures(measure: Measured, stage: Manifest | None) -> dict[str, float]:
    """What is measured of a finished stage, in the order in which its verb names it."""
    if stage is None or (verb := verbs().get(stage.do)) is None:
        return {}
    names = [figure.name for figure in verb.figures if not measure.metrics or figure.name in measure.metrics]
    return {name: stage.metrics[name] for name in names if name in stage.metrics}
