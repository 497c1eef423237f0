"""Sweeps, run: every point a run directory, every stage once, the figures of all points in one table and one page.

    runs/<sweep>/
      sweep.json report.html     points, their settings, where their stages lie, what failed, figures
      shared/<stage>-<hash>/     every stage, named by what it is made of; shared/data the packed rows
      <point>/                   a run directory whose stages are links into shared/

The cascade runs in a point's directory as in any other: what another point has made is a finished stage there. So a
sweep that was killed, or is given another value, goes on with what is there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ministral_jax.errors import UserError
from ministral_jax.files import write_json
from ministral_jax.report.sweep import build_sweep_report, chief_columns, figure_columns, setting
from ministral_jax.runs.cascade import run_cascade
from ministral_jax.runs.run import cache_compilations
from ministral_jax.runs.summary import write_summary
from ministral_jax.runs.sweep import METRICS, Point, Sweep, expand, measured, short_keys, users
from ministral_jax.stages.manifest import Manifest, read_manifest

Record = dict[str, Any]
"""`sweep.json`."""


def run_sweep(sweep: Sweep, sweep_dir: Path) -> int:
    """Run every point, one after another, then write the page and print the table.

    A point that fails for a fault of its settings is recorded and the others go on; anything else, a preemption or
    Ctrl-C among it, ends the sweep at once and the same command goes on from there.

    Returns:
        exit code: 0, or 1 when a point failed.

    Raises:
        UserError: the sweep or a point's recipe is wrong, before anything is written.
    """
    points, record = prepare(sweep, sweep_dir)
    cache_compilations(sweep_dir / "xla")
    broken: dict[str, str] = {}
    for position, entry in enumerate(record["points"]):
        point = points[position]
        _say(f"point [{position + 1}/{len(points)}] {point.name}")
        link(point, sweep_dir)
        entry["error"] = _run_point(point, sweep, sweep_dir, broken)
        if entry["error"] is not None:
            _say(f"point {point.name} failed: {entry['error']}")
        refresh(record, sweep_dir)
    _finish(record, sweep_dir)
    failed = [entry["name"] for entry in record["points"] if entry["error"] is not None]
    if failed:
        _say(f"ministral-jax: {len(failed)} of {len(points)} points failed: {', '.join(failed)}")
    return 1 if failed else 0


def prepare(sweep: Sweep, sweep_dir: Path, write: bool = True) -> tuple[list[Point], Record]:
    """Check everything that can be checked, then `write` `sweep.json`.

    Raises:
        UserError: see `expand` and `measured`; or `sweep_dir` holds something else.
    """
    points = expand(sweep)
    record = describe(sweep, points)
    if (sweep_dir / "recipe.json").exists():
        raise UserError(f"{sweep_dir} is the directory of a single run; give the sweep another --name or --run-dir")
    for point in points:
        for place in (sweep_dir / point.name / name for name in (*point.shared, "data")):
            if place.exists() and not place.is_symlink():
                raise UserError(f"{place} was not made by a sweep (it is no link); delete it or give another --run-dir")
    if write:
        sweep_dir.mkdir(parents=True, exist_ok=True)
        refresh(record, sweep_dir)
    return points, record


def describe(sweep: Sweep, points: Sequence[Point]) -> Record:
    """The sweep as plain values, before anything has run."""
    return {
        "name": sweep.name,
        "recipe": sweep.recipe,
        "keys": short_keys(sweep.keys),
        "axes": [list(axis.keys) for axis in sweep.axes],
        "overrides": sweep.overrides,
        "wanted": list(sweep.stages),
        "measure": [
            {"stage": m.stage, "metrics": list(m.metrics), "curve": list(m.curve)} for m in measured(sweep, points)
        ],
        "stages": len(users(points)),
        "stages_unshared": sum(len(point.shared) for point in points),
        "points": [
            {
                "name": point.name,
                "settings": point.settings,
                "error": None,
                "stages": {name: f"shared/{directory}" for name, directory in point.shared.items()},
            }
            for point in points
        ],
    }


def link(point: Point, sweep_dir: Path) -> None:
    """Make the point's run directory: its stages, and its packed data, are links to where they are shared."""
    for name, target in {**point.shared, "data": "data"}.items():
        (sweep_dir / "shared" / target).mkdir(parents=True, exist_ok=True)
        place, wanted = sweep_dir / point.name / name, os.path.join("..", "shared", target)
        place.parent.mkdir(exist_ok=True)
        if place.is_symlink() and os.readlink(place) == wanted:
            continue
        temporary = place.with_name(place.name + ".tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(wanted)
        os.replace(temporary, place)


def _run_point(point: Point, sweep: Sweep, sweep_dir: Path, broken: dict[str, str]) -> str | None:
    """None, or why the point failed. `broken` remembers stages that failed, so that no other point tries them again."""
    for name, where in point.shared.items():
        if where in broken:
            return f"stage {name!r} failed in point {broken[where]}, which shares it"
    run_dir = sweep_dir / point.name
    try:
        run_cascade(point.recipe, run_dir, sweep.stages)
    except UserError as error:
        pending = [(name, where) for name, where in point.shared.items() if _manifest(run_dir / name) is None]
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


def refresh(record: Record, sweep_dir: Path) -> None:
    """Fill in what the stages say by now, and write `sweep.json`."""
    manifests = {
        where: _manifest(sweep_dir / where) for where in {w for p in record["points"] for w in p["stages"].values()}
    }
    for point in record["points"]:
        made = {name: manifests[where] for name, where in point["stages"].items()}
        finished = all(manifest is not None for manifest in made.values())
        point["error"] = None if finished else point["error"]
        point["state"] = "finished" if finished else "unfinished" if point["error"] is None else "failed"
        point["figures"] = {
            m["stage"]: {
                metric: value
                for metric in m["metrics"] or METRICS
                if (stage := made[m["stage"]]) and (value := stage.metrics.get(metric)) is not None
            }
            for m in record["measure"]
        }
    record["seconds"] = round(sum(manifest.seconds for manifest in manifests.values() if manifest), 1)
    write_json(sweep_dir / "sweep.json", record)


def report_sweep(sweep_dir: Path) -> None:
    """Write `sweep.json` and `report.html` of a sweep from what is in its directory, and print its table.

    Raises:
        UserError: not a sweep's directory.
    """
    try:
        record = json.loads((sweep_dir / "sweep.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{sweep_dir} is not a sweep: it has no readable sweep.json") from None
    refresh(record, sweep_dir)
    _finish(record, sweep_dir)


def _finish(record: Record, sweep_dir: Path) -> None:
    page = build_sweep_report(sweep_dir)
    width = None if sys.stdout.isatty() else 120  # in a log, rich would cut the columns at 80
    Console(width=width).print(sweep_table(record))
    _say(f"report: {page}")


def sweep_table(record: Record) -> Table:
    """The varying keys and the figures of every point; the best of a column is bold."""
    done = sum(point["state"] == "finished" for point in record["points"])
    table = Table(title=f"{record['name']}: {done} of {len(record['points'])} points, {record['seconds']:,.0f} s")
    for short in record["keys"].values():
        table.add_column(short)
    columns, several = chief_columns(record, figure_columns(record)), len(record["measure"]) > 1
    for column in columns:
        table.add_column(f"{column.stage} {column.metric}" if several else column.metric, justify="right")
    unfinished = done < len(record["points"])
    if unfinished:
        table.add_column("")
    for point in record["points"]:
        figures = [
            Text(column.show(point), style="bold" if column.is_best(record, point) else "") for column in columns
        ]
        state = [point["state"] if point["state"] != "finished" else ""] if unfinished else []
        table.add_row(*(Text(setting(point["settings"][key])) for key in record["keys"]), *figures, *state)
    return table


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
