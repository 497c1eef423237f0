"""Paths at gs:// and s3:// that answer as `pathlib.Path` does, as far as the project asks.

An object store has objects and no directories: `mkdir` does nothing, a directory is there once something lies below it,
and an object is written whole or not at all. Nothing can be appended to or renamed at once, so `open` only reads.
Whoever may read and write there is the affair of gcsfs and s3fs, which find credentials as they always do.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from etils.epath.gpath import PosixGPath


@cache
def _store(scheme: str) -> Any:
    """Its fsspec file system. Listings are not kept, nor are they by Orbax's own: other processes write there."""
    import fsspec
    from fsspec.config import conf

    for protocol in ("gcs", "gs", "s3"):
        conf.setdefault(protocol, {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it raises it also logs, with a traceback
    return fsspec.filesystem(scheme)


class BucketPath(PosixGPath):
    """A path of an object store. What goes wrong there is an `OSError` that names the path."""

    def _ask(self, verb: str, *args: Any, **options: Any) -> Any:
        try:
            return getattr(_store(self.parts[1]), verb)(str(self), *args, **options)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self)) from error
        except FileExistsError as error:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self)) from error
        except Exception as error:  # of the client, of its credentials or of the network: each has types of its own
            text = (str(error).splitlines() or [""])[0]
            raise OSError(errno.EIO, f"{type(error).__name__}: {text}", str(self)) from error

    # ---- what is there ----

    def _type(self) -> str | None:
        """`file`, `directory`, or None where nothing is. The clients' own `isfile` says so too of a store that does not
        answer, and a finished stage would be made again."""
        try:
            return self._ask("info")["type"]
        except FileNotFoundError:
            return None

    def exists(self, **_: Any) -> bool:
        return self._type() is not None

    def is_file(self, **_: Any) -> bool:
        return self._type() == "file"

    def is_dir(self, **_: Any) -> bool:
        return self._type() == "directory"

    def is_symlink(self) -> bool:
        return False

    def stat(self, **_: Any) -> Any:
        """`st_size` in bytes, and the time of the object's last change in ns."""
        info = self._ask("info")
        changed = info.get("mtime") or info.get("LastModified")
        moment = int(changed.timestamp() * 1e9) if changed is not None else 0
        return SimpleNamespace(st_size=info["size"], st_mtime_ns=moment, st_ctime_ns=moment)

    lstat = stat

    def iterdir(self) -> Iterator[Any]:
        try:
            found = self._ask("ls", detail=False)
        except FileNotFoundError:  # a directory in which nothing lies yet
            return
        names = {
            name.rstrip("/").rpartition("/")[2] for name in found if f"{self.parts[1]}://{name.strip('/')}" != str(self)
        }
        yield from (self / name for name in sorted(names))

    def glob(self, pattern: str, **_: Any) -> Iterator[Any]:
        yield from (self._new(f"{self.parts[1]}://{name}") for name in (self / pattern)._ask("glob"))

    def rglob(self, pattern: str, **_: Any) -> Iterator[Any]:
        """The objects below it; `pattern` is of their names."""
        found = (self._new(f"{self.parts[1]}://{name}") for name in self._ask("find"))
        yield from (path for path in found if path.match(pattern))

    # ---- content ----

    def open(self, mode: str = "r", *_: Any, encoding: str | None = None, errors: str | None = None) -> IO[Any]:  # type: ignore[override]
        if mode not in ("r", "rb"):
            raise ValueError(f"{self} cannot be opened as {mode!r}: an object is written whole")
        text = {} if mode == "rb" else {"encoding": encoding or "utf-8", "errors": errors}
        return self._ask("open", mode, **text)

    def read_bytes(self) -> bytes:
        return self._ask("cat_file")

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: bytes) -> int:
        self._ask("pipe_file", data)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, **_: Any) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def create(self, data: bytes) -> None:
        """Write it unless it is there. Raises `FileExistsError`: it is; of several who try at once one succeeds."""
        self._ask("pipe_file", data, mode="create")

    def fetch(self, path: Path) -> None:
        """Copy the object to a local file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._ask("get_file", str(path))

    def put(self, path: Path) -> None:
        """Write the object from a local file."""
        try:
            _store(self.parts[1]).put_file(str(path), str(self))
        except Exception as error:
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(self)) from error

    def copy(self, target: BucketPath) -> None:
        """Copy the object to another name of the same kind of store, which does it itself."""
        self._ask("cp_file", str(target))

    # ---- names ----

    def mkdir(self, *_: Any, **__: Any) -> None:
        pass

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._ask("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, missing_ok: bool = True) -> None:
        try:
            self._ask("rm", recursive=True)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def absolute(self) -> Any:
        return self

    def resolve(self, strict: bool = False) -> Any:
        return self

    def expanduser(self) -> Any:
        return self
