"""Digests of files that are read once: what was found is kept until a file changes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ministral_jax.files import append_jsonl, file_digest, is_remote, read_jsonl
from ministral_jax.places import cache_directory

SETTLED = 2.0
"""Seconds for which a file must have been left alone: it may change again within a tick of its clock."""


class Digests:
    """What was computed of files, in `root/digests.jsonl`, by their paths, sizes and times of change: of the content's
    change, and of any, so that a file in the place of another is noticed though it was given that one's time.

    The file may be deleted at any time. Without a `root`, or where it cannot be written, nothing is kept.
    """

    def __init__(self, root: Path | None):
        place = cache_directory() if root is not None and is_remote(root) else root
        self._path = None if place is None else place / "digests.jsonl"
        self._kept = {r.get("of"): r for r in read_jsonl(self._path)} if self._path is not None else {}

    def of(self, what: str, files: Iterable[Path], compute: Callable[[], Any]) -> Any:
        """`compute()`, a JSON value that depends on the content of `files` alone; or what it was when they were last as
        they are now. `what` tells it from all else."""
        began, newest, stamp = time.time(), 0, hashlib.sha256()
        for file in files:
            found: tuple[int, ...] = ()
            with suppress(OSError):
                s = file.stat()
                found = (s.st_size, s.st_mtime_ns, s.st_ctime_ns)
            newest = max(newest, *found[1:], 0)
            stamp.update(repr((str(file), found)).encode("utf-8", "surrogatepass"))
        kept = self._kept.get(what)
        if kept is not None and kept.get("stamp") == stamp.hexdigest():
            return kept["value"]
        value = compute()
        if newest < (began - SETTLED) * 1e9:
            self._keep({"of": what, "stamp": stamp.hexdigest(), "value": value})
        return value

    def of_file(self, path: Path) -> str:
        """`file_digest` of a file."""
        return self.of(f"file {path}", [path], lambda: file_digest(path))

    def _keep(self, record: dict[str, Any]) -> None:
        self._kept[record["of"]] = record
        if self._path is not None:
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                append_jsonl(self._path, record)
