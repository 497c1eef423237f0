"""Where the figures of a stage go: metrics.jsonl is the truth, a tracker shows them as they come."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import jax

from ministral_jax.errors import UserError
from ministral_jax.files import is_remote, read_jsonl, write_text
from ministral_jax.places import Lines, put_files

Track = Literal["tensorboard", "wandb", "trackio"]


def mean(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Host values of (sum, count) pairs; nothing counted gives 0."""
    fetched = jax.device_get(dict(metrics))
    return {name: float(total) / max(float(count), 1.0) for name, (total, count) in fetched.items()}


class Tracker(Protocol):
    """A view of the figures beside the log."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `<stage>/events`; in a bucket, to which no event can be added, as they are at each `flush`."""

    def __init__(self, directory: Path, resume_step: int | None):
        from tensorboardX import SummaryWriter

        self._place = directory / "events"
        local = Path(tempfile.mkdtemp()) if is_remote(directory) else self._place
        self._local = local
        self._events = SummaryWriter(str(local), purge_step=(resume_step or 0) + 1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        if self._local != self._place:
            self._events.flush()
            put_files(self._local, self._place)

    def close(self) -> None:
        self._events.close()
        if self._local != self._place:
            put_files(self._local, self._place)
            shutil.rmtree(self._local, ignore_errors=True)


class Service:
    """wandb, or trackio, which has the same interface. A stage is one run of the project named after the run directory;
    going on after a stop continues it."""

    def __init__(self, module: str, directory: Path):
        self._module = importlib.import_module(module)
        place = directory.absolute()
        settings: dict[str, Any] = {"project": place.parent.name, "name": place.name, "resume": "allow"}
        if module == "wandb":
            here = {} if is_remote(place) else {"dir": str(place)}
            settings |= {"id": hashlib.sha256(str(place).encode()).hexdigest()[:16], **here}
        self._module.init(**settings)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._module.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._module.finish()


def check_tracker(track: Track, where: str) -> None:
    """Raise `UserError` when a tracker is asked for that is not installed."""
    if track != "tensorboard" and importlib.util.find_spec(track) is None:
        raise UserError(f"{where}.track = {track} is not installed; pip install {track}, or use track: tensorboard")


class StageLog:
    """Metrics of one stage, written by the first process. Lines of steps after `resume_step` (a run that was killed)
    are dropped on opening, but for where their time went; and the evaluation of `resume_step` itself, unless it was
    `evaluated` before the state that is gone on from was saved."""

    def __init__(self, directory: Path, resume_step: int | None, evaluated: bool = True, track: Track = "tensorboard"):
        self._path = directory / "metrics.jsonl"
        self._file: Lines | None = None
        known = read_jsonl(self._path)
        self.attempts = max((r["attempt"] for r in known if r["kind"] == "time"), default=0)
        if jax.process_index() != 0:
            return
        stands = (-1, False) if resume_step is None else (resume_step, evaluated)
        kept = [r for r in known if r["kind"] == "time" or (r["step"], r["kind"] == "eval") <= stands]
        write_text(self._path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = Lines(self._path)
        board = track == "tensorboard"
        self._tracker: Tracker = TensorBoard(directory, resume_step) if board else Service(track, directory)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._add({"kind": kind, "step": step, **values})
            self._tracker.write(kind, step, values)

    def write_time(self, record: Mapping[str, Any]) -> None:
        """A record of `goodput`."""
        if self._file is not None:
            self._add({"kind": "time", "at": round(time.time(), 3), **record})

    def _add(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.add(json.dumps(record))

    def flush(self) -> None:
        """What was written is where it stays if the process ends now."""
        if self._file is not None:
            self._file.flush()
            self._tracker.flush()

    def close(self) -> None:
        if self._file is not None:
            self._tracker.close()
            self._file.close()
