"""What a run or a sweep keeps that no finished result needs, and its removal."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from ministral_jax.errors import UserError
from ministral_jax.files import is_remote
from ministral_jax.runs.reading import Run, read_run
from ministral_jax.runs.survey import is_taken
from ministral_jax.runs.sweep_run import read_record


def leftovers(run_dir: Path) -> dict[str, list[Path]]:
    """By what they are, files and directories that can be made again or are of no more use.

    Raises:
        UserError: neither a run nor a sweep.
    """
    found: dict[str, list[Path]] = {"compiled programs": list(run_dir.glob("xla"))}
    if (run_dir / "sweep.json").is_file():
        used = {where for point in read_record(run_dir).points for where in point.stages.values()}
        others = [path for path in run_dir.glob("shared/*-*") if f"shared/{path.name}" not in used]
        found["stages of no point of the sweep"] = [path for path in others if path.is_symlink() or not is_taken(path)]
        return {what: paths for what, paths in found.items() if paths}
    run = read_run(run_dir)
    stages = [run_dir / name for name, stage in run.stages.items() if stage.state == "finished"]
    own = [directory for directory in stages if not directory.is_symlink()]
    found["optimiser states of finished stages"] = [
        path for path in (place / "state" for place in own) if path.is_dir()
    ]
    found["packed data that no stage reads"] = list(_unread(run_dir, run))
    return {what: paths for what, paths in found.items() if paths}


def _unread(run_dir: Path, run: Run) -> Iterator[Path]:
    """While a stage is to be made nobody knows what it will read: nothing then."""
    if any(stage.state == "unfinished" for stage in run.stages.values()):
        return
    manifests = [stage.manifest for stage in run.stages.values() if stage.manifest]
    read = {m.data.digest[:16] for m in manifests if m.data is not None and m.data.digest is not None}
    for path in run_dir.glob("data/*"):
        is_draft, is_packed = path.name.startswith("."), (path / "index.json").is_file()
        if is_draft or path.name == "documents" or (is_packed and path.name not in read):
            yield path


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a directory; what a link leads to is not counted."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


def remove(path: Path) -> None:
    try:
        if is_remote(path) and path.is_dir():
            cast(Any, path).rmtree()
        else:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise UserError(f"{error.filename} cannot be removed: {error.strerror}") from None
