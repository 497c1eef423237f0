"""Whether what lies in a directory is what was written there: sizes and SHA-256 of its files, and what all processes
agree to be wrong."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from ministral_jax.distributed.collectives import first_problem
from ministral_jax.files import file_digest

Files = dict[str, Any]
"""Relative path -> [size in bytes, SHA-256 in hex]; survives JSON unchanged."""

_THREADS = min(8, os.cpu_count() or 1)


def checksums(directory: Path) -> Files:
    """Of every file under `directory`."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(file_digest, paths)
        return {
            path.relative_to(directory).as_posix(): [path.stat().st_size, digest]
            for path, digest in zip(paths, digests, strict=True)
        }


def damage(directory: Path, files: Files) -> str | None:
    """What differs from `files`, or None: "NAME is missing", "NAME has 3 bytes instead of 5", ..

    All processes call it; each reads its share of the files and learns what the others found.
    """
    if not _well_formed(files):
        return "the list of its files is not readable"
    share = sorted(files, key=lambda name: (-files[name][0], name))[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor(_THREADS) as pool:
        findings = pool.map(lambda name: _difference(directory, name, *files[name]), share)
        return first_problem(next((finding for finding in findings if finding), None))


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
        return f"{name} cannot be read: {error.strerror}"
