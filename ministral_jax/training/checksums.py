"""Whether what lies in a directory is what was written there: sizes and SHA-256 of its files, and what all processes
agree to be wrong."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from ministral_jax.distributed.collectives import Gathering, first_problem
from ministral_jax.distributed.processes import Unreachable
from ministral_jax.files import file_digest, is_remote

Files = dict[str, Any]
"""Relative path -> [size in bytes, SHA-256 in hex]; survives JSON unchanged."""

_NETWORK = "network: "
"""Begins what is told of a file that may be whole."""
_THREADS = min(8, os.cpu_count() or 1)
_WRITER = re.compile(r"(?:^|/)(?:ocdbt\.)?process_(\d+)(?:/|$)")
"""How Orbax names what each process writes: `ocdbt.process_3/..`, `array_metadatas/process_3`."""


def checksums(directory: Path, gathering: Gathering, waiting: Callable[[], None]) -> Files:
    """Of every file under a directory that all processes have written, which all must ask for; process 0 learns them
    all, the others theirs. It may be asked for in a thread.

    Each process reads what it wrote: the memory of its host may still hold it, and the hosts read at once. `waiting` is
    called while process 0 waits for the others, and may raise.
    """
    names, process = _names(directory), jax.process_index()
    files = _digests(directory, [name for name in names if _writer(name) == process])
    if process > 0:
        gathering.tell(json.dumps(files))
        return files
    for told in gathering.told(waiting):
        files |= json.loads(told)
    # what was renamed a moment ago a network file system may show to the others later
    files |= _digests(directory, [name for name in names if name not in files])
    # of what the others told, too, that this process does not see yet; in the order of paths
    return {name: files[name] for name in sorted(files, key=lambda name: name.split("/"))}


def _names(directory: Path) -> list[str]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return [path.relative_to(directory).as_posix() for path in paths]


def _writer(name: str) -> int:
    """The process that wrote a file; process 0 writes what is of all."""
    return int(found[1]) if (found := _WRITER.search(name)) else 0


def _digests(directory: Path, names: list[str]) -> Files:
    with ThreadPoolExecutor(_THREADS) as pool:
        measure = lambda name: [(directory / name).stat().st_size, file_digest(directory / name)]
        return dict(zip(names, pool.map(measure, names), strict=True))


def damage(directory: Path, files: Files) -> str | None:
    """What differs from `files`, or None: "NAME is missing", "NAME has 3 bytes instead of 5", ..

    All processes call it; each reads its share of the files and learns what the others found.

    Raises:
        Unreachable: an object could not be read for the network's sake. On every process.
    """
    if not _well_formed(files):
        return "the list of its files is not readable"
    share = sorted(files, key=lambda name: (-files[name][0], name))[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor(_THREADS) as pool:
        findings = pool.map(lambda name: _difference(directory, name, *files[name]), share)
        found = first_problem(next((finding for finding in findings if finding), None))
    if found is not None and found.startswith(_NETWORK):
        raise Unreachable(found.removeprefix(_NETWORK))
    return found


def _well_formed(files: Any) -> bool:
    entries = files.values() if isinstance(files, dict) else ()
    return bool(entries) and all(
        isinstance(e, list) and len(e) == 2 and isinstance(e[0], int) and isinstance(e[1], str) for e in entries
    )


def _difference(directory: Path, name: str, size: int, digest: str) -> str | None:
    path = directory / name
    try:
        if (found := path.stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
        return None if file_digest(path) == digest else f"the content of {name} has changed since it was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        if is_remote(path):  # of the network, which says nothing of the file
            return f"{_NETWORK}{path} could be checked: {error.strerror}"
        return f"{name} cannot be read: {error.strerror}"
