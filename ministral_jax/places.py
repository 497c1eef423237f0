"""Where files may lie: a file system or an object store, and what is done another way in the one than in the other.

In an object store objects are written whole, a directory is complete once the file that is written last is there, and
what must lie on a disk to be read is copied to one.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from ministral_jax.errors import UserError
from ministral_jax.files import digest_of, is_remote, write_text

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_CLIENTS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
"""What reads and writes a scheme, and the extra that installs it."""
_THREADS = 8
_LOG = logging.getLogger(__name__)
_PUT_SECONDS = 30.0


def refuse_url(path: str | Path, what: str, accepted: str = "") -> None:
    """Raises `UserError`: `path`, which is `what` in the message, is a URL. As a `Path`, which keeps one slash of two,
    it would be a directory called `gs:` below the working one."""
    if (match := _URL.match(str(path))) is not None:
        if (scheme := match[1].lower()) in _CLIENTS and accepted:
            raise UserError(
                f"{what} {path} lacks two slashes and a bucket, or small letters; give {scheme}://bucket/name"
            )
        raise UserError(
            f"{what} {path} is a URL, and {match[1]}: is neither read nor written; give a directory of a file system "
            f"that is mounted here{accepted}"
        )


def place(text: str | Path, what: str, accepted: str = "gs://bucket/name or s3://bucket/name") -> Path:
    """A path, local or at gs:// or s3://: there a `BucketPath`, passed on as a `Path`, whose methods it has.

    Raises:
        UserError: another kind of URL, or what reads and writes that one is not installed. `what` begins the message.
    """
    scheme, separator, rest = str(text).partition("://")
    if is_remote(cast(Path, text)) and not isinstance(text, str):
        return text
    if not separator or scheme not in _CLIENTS or not rest.strip("/"):
        refuse_url(text, what, f", or {accepted}")
        return Path(text)
    client, extra = _CLIENTS[scheme]
    if find_spec(client) is None:
        raise UserError(
            f"{what} {text} needs {client}, which is not installed; in the checkout, pip install -e '.[{extra}]'"
        )
    from ministral_jax.buckets import BucketPath

    return cast(Path, BucketPath(str(text)))


def local_place(text: str | Path, what: str) -> Path:
    """A path of a file system. Raises `UserError`: a URL."""
    refuse_url(text, what)
    return Path(text)


def run_place(text: str | Path, what: str) -> Path:
    """`place` of a run's directory. Raises `UserError`: as there, and at s3://."""
    found = place(text, what, "gs://bucket/name")
    if is_remote(found) and str(found).startswith("s3://"):
        raise UserError(
            f"{what} {text}: a run is not written to s3://, where Orbax saves no state; give a directory of a file "
            "system that is mounted here, or gs://bucket/name (data, logit stores and exports may lie at s3://)"
        )
    return found


def cache_directory() -> Path:
    """Where this user's caches of the project lie: what is in it can be made again."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "ministral_jax"


# ---- directories that are named by their content --------------------------------------------------------------------


@contextmanager
def new_directory(final: Path, last: str) -> Iterator[Path]:
    """A local draft directory that appears as `final` on success and is removed on failure.

    On a file system it is renamed, and when another process finishes `final` first its result stays: names hold a
    digest of the content, so they are equal. In an object store its files are written, `last` after all others.
    """
    if is_remote(final):
        kept = _kept(final)
        with new_directory(kept, last) as draft:
            yield draft
        put_files(kept, final, last)
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        yield draft
        draft.chmod(0o755)
        try:
            os.rename(draft, final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def is_complete(directory: Path, last: str) -> bool:
    """Whether all of what `new_directory` makes is there."""
    return (directory / last).is_file() if is_remote(directory) else directory.is_dir()


def on_disk(directory: Path) -> Path:
    """A directory that is named by its content, itself or as a copy in the user's cache."""
    return _copied(directory, _kept(directory)) if is_remote(directory) else directory


def fetched(directory: Path) -> Path:
    """A directory of an exported or downloaded model, itself or as a copy in the user's cache; it is copied again when
    an object below it has changed. Raises `UserError`: a place in a bucket that holds nothing."""
    if not is_remote(directory):
        return directory
    state = [[str(path), (found := path.stat()).st_size, found.st_mtime_ns] for path in sorted(directory.rglob("*"))]
    if not state:
        raise UserError(f"{directory} is not a directory")
    return _copied(directory, cache_directory() / "checkpoints" / digest_of(state)[:16])


def _copied(directory: Path, kept: Path) -> Path:
    """`kept`, with the files of a directory of an object store unless it is there already."""
    if not kept.is_dir():
        with new_directory(kept, "") as draft:
            fetch_files(directory, draft)
    return kept


def _kept(directory: Path) -> Path:
    return cache_directory() / "data" / directory.name


# ---- files and trees ------------------------------------------------------------------------------------------------


def put_files(directory: Path, place: Path, last: str = "") -> None:
    """Copy the files below a local directory to an object store, `last` after all others."""
    copy_tree(directory, place, last, spare="")


def fetch_files(place: Path, directory: Path) -> None:
    """Copy the objects below a place to a local directory."""
    copy_tree(place, directory, last="", spare="")


def _names(directory: Path, spare: str) -> list[str]:
    paths = [path.relative_to(directory) for path in directory.rglob("*") if is_remote(path) or path.is_file()]
    return [path.as_posix() for path in paths if path.parts[0] != spare]


def _each(copy: Any, what: Iterable[Any]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(copy, what))


def remove_tree(path: Path) -> None:
    """Remove a directory and what is below it, as far as that can be done."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        cast(Any, path).rmtree()
    except OSError as error:  # one process removes, and others would wait for it
        _LOG.warning("%s could not be removed: %s", path, error.strerror)


def move(directory: Path, target: Path) -> None:
    """At once on a file system; object by object in an object store."""
    if is_remote(directory):
        copy_tree(directory, target, last="", spare="")
        remove_tree(directory)
    else:
        os.replace(directory, target)


def copy_tree(place: Path, target: Path, last: str, spare: str) -> None:
    """Copy the files of a directory from or to an object store, `last` after all others and those in `spare` not."""
    if is_remote(place) and is_remote(target) and place.parts[1] != target.parts[1]:  # of two kinds: by way of a disk
        with tempfile.TemporaryDirectory() as scratch:
            copy_tree(place, Path(scratch), last, spare)
            copy_tree(Path(scratch), target, last, spare="")
        return

    def copy(name: str) -> None:
        ours, theirs = cast(Any, place / name), cast(Any, target / name)
        if not is_remote(place):
            theirs.put(ours)
        elif is_remote(target):
            ours.copy(theirs)
        else:
            ours.fetch(theirs)

    names = _names(place, spare)
    _each(copy, (name for name in names if name != last))
    if last in names:
        copy(last)


class Lines:
    """A text file that grows by lines. In an object store, where nothing is appended, all of it is written anew: now
    and then, when `flush` asks for it, and at the end."""

    def __init__(self, path: Path):
        self._path, self._file = path, None
        if not is_remote(path):
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
            return
        self._text = [path.read_text(encoding="utf-8")] if path.is_file() else []
        self._put, self._is_new = time.monotonic(), False

    def add(self, line: str) -> None:
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()
            return
        self._text.append(line + "\n")
        self._is_new = True
        if time.monotonic() - self._put >= _PUT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Everything that was added can be read."""
        if self._file is None and self._is_new:
            self._text = ["".join(self._text)]
            write_text(self._path, self._text[0].encode(errors="backslashreplace").decode())
            self._put, self._is_new = time.monotonic(), False

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
