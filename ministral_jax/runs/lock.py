"""A run directory has one owner at a time, on any file system that creates a file at most once.

`.owner/` holds one small file, numbered. Who begins makes the file of the next number, which only one can, and then
removes the ones before it; who ends marks its own as left. So the numbers only rise, and nobody removes a file that
says somebody is there. An owner is known to be dead by its process where it ran on this machine; elsewhere by its file,
which it touches every few seconds, not changing for a while. Clocks are not compared, and no `flock` is needed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from ministral_jax.errors import UserError
from ministral_jax.files import is_remote, write_text

BEAT_SECONDS = 10.0
SILENT_SECONDS = 60.0
"""After which an owner on another machine counts as dead."""
LOST = 75


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Own `directory`, which is made if need be, while the block runs.

    Raises:
        UserError: somebody else does, or it cannot be written.
    """
    place = directory / ".owner"
    if directory.is_symlink() and not directory.exists():
        raise UserError(f"{directory} is a link to {os.readlink(directory)}, which is not there")
    try:
        place.mkdir(parents=True, exist_ok=True)
        own = _take(place, directory)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""  # of a full disk none is named
        raise UserError(f"{directory} cannot be a run's directory: {error.strerror}{where}") from None
    over = threading.Event()
    beat = threading.Thread(target=_beat, args=(own, over), daemon=True, name="owner of the run")
    beat.start()
    try:
        yield
    finally:
        over.set()
        beat.join()
        with suppress(OSError):
            _write(own, {**_self(), "left": True})


def owner(directory: Path) -> dict[str, Any] | None:
    """Who owns a run's directory, as far as can be said at once: "host", "pid", "since", "command"."""
    found = _newest(directory / ".owner")
    if found is None or not (said := _read(found)) or said.get("left") or _is_dead(said):
        return None
    return said


def named(said: dict[str, Any]) -> str:
    """What an `owner` is called."""
    return f"process {said['pid']} on {said['host']}, since {said['since']}"


def _take(place: Path, directory: Path) -> Path:
    while True:
        newest = _newest(place)
        if newest is not None:
            said = _read(newest)
            if not said.get("left") and not _is_dead(said) and not _falls_silent(newest, said):
                raise UserError(_refusal(directory, said))
        own = place / f"{int(newest.name) + 1 if newest else 1:06d}"
        try:
            _create(own)
        except FileExistsError:
            time.sleep(0.1)  # somebody was faster; who that is will stand there in a moment
            continue
        _write(own, _self())
        if _newest(place) != own:  # of a number that was used before
            own.unlink()
            continue
        for older in _files(place):
            if older.name < own.name:
                older.unlink(missing_ok=True)
        return own


def _refusal(directory: Path, said: dict[str, Any]) -> str:
    who = named(said) if said else "a process that has just begun"
    return f"{directory} is being written by {who}; wait for its end or stop it, or give another --run-dir"


def _files(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.name.isdecimal()) if place.is_dir() else []


def _newest(place: Path) -> Path | None:
    return next(reversed(_files(place)), None)


def _read(path: Path) -> dict[str, Any]:
    """Empty while it is being written, or where it does not say who is there."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_told = isinstance(said, dict) and type(said.get("pid")) is int and {"host", "since"} <= said.keys()
    return said if is_told else {}


def _write(path: Path, said: dict[str, Any]) -> None:
    """Say it, or on a full disk leave nothing: a file that says nothing is waited for."""
    if is_remote(path):
        write_text(path, json.dumps(said))
        return
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps(said))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _create(path: Path) -> None:
    """Make the file, which only one can. An object store does it for a write on condition that no object is there."""
    if is_remote(path):
        cast(Any, path).create(b"")
    else:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def _touch(path: Path) -> None:
    """A sign of life: the file's time of change, for which an object is written anew."""
    if is_remote(path):
        path.write_bytes(path.read_bytes())
    else:
        os.utime(path)


def _self() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "begun": _begun(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv[:20]),
    }


def _machine() -> list[str]:
    """What tells machines, and containers on them, apart; a process number means something within it."""
    with suppress(OSError):
        return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return [socket.gethostname()]


def _begun(pid: int) -> str | None:
    """When a process began, in the machine's ticks, so that a number that was given again is not taken for the old
    process; None where the system does not say or it is gone."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    return None


def _is_dead(said: dict[str, Any]) -> bool:
    """Known for sure: it ran on this machine and is gone."""
    if said.get("machine") != _machine():
        return False
    try:
        os.kill(said["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's: it is there
        return False
    return said.get("begun") is not None and _begun(said["pid"]) != said["begun"]


def _falls_silent(path: Path, said: dict[str, Any]) -> bool:
    """Watch an owner elsewhere, or one that has not said who it is, until it gives a sign of life or too long none."""
    if said and said.get("machine") == _machine():
        return False
    seen, end = _sign(path), time.monotonic() + SILENT_SECONDS
    who = f"{said['host']}, whose run this is" if said else f"who made {path}, which does not say who that is"
    print(f"waiting for a sign of life from {who}", file=sys.stderr, flush=True)
    while time.monotonic() < end:
        time.sleep(min(0.5, SILENT_SECONDS / 10))
        if _sign(path) != seen:
            return False
    return True


def _sign(path: Path) -> tuple[int, bytes]:
    with suppress(OSError):
        content = path.read_bytes()  # first: network file systems look anew when a file is opened
        return path.stat().st_mtime_ns, content
    return 0, b""


def _beat(own: Path, over: threading.Event) -> None:
    """Give signs of life; a process that was taken for dead ends before it writes over another one's work."""
    while not over.wait(BEAT_SECONDS):
        with suppress(OSError):
            if (newest := _newest(own.parent)) is not None and newest.name > own.name:
                said = _read(newest)
                print(f"ministral-jax: {_refusal(own.parent.parent, said)}", file=sys.stderr, flush=True)
                os._exit(LOST)
            _touch(own)
