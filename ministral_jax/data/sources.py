"""Where documents come from. Everything is read in an order that depends on names alone."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any

from ministral_jax.data.bad_rows import Unusable, say_once
from ministral_jax.data.config import SourceConfig
from ministral_jax.data.conversation import Document
from ministral_jax.data.digests import Digests
from ministral_jax.data.jsonl import lines_of, parse_row
from ministral_jax.data.tasks import KINDS, read_task, task_digest
from ministral_jax.errors import UserError
from ministral_jax.files import digest_of, file_digest, is_remote, open_plain, read_at_most, stable_key
from ministral_jax.places import place

# Tests and bundled packages are not the library; the encodings are tables of code points.
_LEFT_OUT = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "site-packages", "dist-packages", "encodings"}
_SUFFIXES = {"text": (".txt", ".md"), "jsonl": (".jsonl", ".ndjson")}
_PACKED = ("", ".gz", ".bz2", ".xz")
MOST_TEXT = 2**30
"""Bytes of a text: a file that is packed may hold one that memory does not."""


@dataclass(frozen=True)
class Source:
    """A source whose files exist. `digest` changes with anything that changes its documents."""

    name: str
    config: SourceConfig
    files: tuple[tuple[str, Path], ...]
    """(key, path): of a text the digest of its content, of a module and of a JSONL file its name in the directory."""
    digest: str


def open_source(name: str, config: SourceConfig, root: Path | None = None) -> Source:
    """List the files of a source and digest their content, and that of the pictures that rows of JSONL name.

    The digest is one of content and of settings: neither names of files and directories nor times are in it, nor do
    documents depend on them, but for the order in which a directory's JSONL files are read.

    Args:
        root: where digests of files that do not change are kept, see `Digests`; None reads everything.

    Raises:
        UserError: no file matches, or one cannot be read.
    """
    digests = Digests(root)
    if config.kind in KINDS:
        return Source(name, config, (), digest_of([config.kind, config.limit, task_digest(config, digests)]))
    files = _list_files(name, config)
    if config.kind == "jsonl":
        content: Any = [_digest_jsonl(path, digests) for _, path in files]
    else:
        content = [(key, digests.of_file(path)) for key, path in files]
    if config.kind == "text":
        # In the order of a hash, so that the first `limit` are a fair sample and not the beginning of the alphabet.
        keyed = sorted(zip((digest for _, digest in content), (path for _, path in files), strict=True))
        files = tuple(keyed[: config.limit])
        content = [key for key, _ in files]
    return Source(name, config, files, digest_of([config.kind, config.limit, content]))


def source_digest(config: SourceConfig, root: Path | None = None) -> str | None:
    """`open_source(..).digest`; None where the source is gone or cannot be read. `root` is the data directory of a run,
    in which files that did not change are known already."""
    with suppress(UserError, OSError):
        return open_source("", config, root).digest
    return None


def read_rows(source: Source, prompts: bool = False, pairs: bool = False) -> Iterator[Document | Unusable]:
    """The documents of a source and the rows that are none, one at a time; images of files are still paths.

    As `prompts`, conversations end with what is to be answered; the last answer, where there is one, is left out. As
    `pairs`, every document has two answers: see `pairwise.pair_document`.

    Raises:
        UserError: a file as a whole cannot be read, or the source is of a kind that has no prompts, or no pairs.
    """
    kind, limit = source.config.kind, source.config.limit
    if prompts and kind in ("text", "python-library"):
        raise UserError(f"data.sources.{source.name} is plain text, of kind {kind!r}: it has no prompts to be answered")
    if pairs and kind not in ("jsonl", "preferences"):
        raise UserError(f"data.sources.{source.name} of kind {kind!r} has no pairs; give jsonl or preferences")
    if kind in KINDS:
        yield from read_task(source.config, prompts, pairs)
    elif kind == "jsonl":
        rows = ((relative, path, n, line) for relative, path in source.files for n, line in lines_of(path))
        for relative, path, n, line in islice(rows, limit):
            where = f"{path} row {n}"
            try:
                documents = parse_row(line, path, f"{relative}:{n}", where, prompts, pairs)
                _check_pictures(documents, where)
            except UserError as error:
                yield Unusable(where, error)
            else:
                yield from documents
    else:
        for key, path in source.files:
            try:
                yield Document(key, str(path), text=_read_text(path))
            except UserError as error:
                yield Unusable(str(path), error)


def read_documents(source: Source, prompts: bool = False) -> Iterator[Document]:
    """The documents of `read_rows`. Raises `UserError`: as there, and at the first row that is none."""
    for row in read_rows(source, prompts):
        if isinstance(row, Unusable):
            raise row.error
        yield row


def _list_files(name: str, config: SourceConfig) -> tuple[tuple[str, Path], ...]:
    if config.kind in KINDS:
        return ()
    if config.kind == "python-library":
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in _python_files(root) if _is_library(path)]
        if not paths:
            raise UserError(
                f"data.sources.{name}: this Python has no library sources in {root}; use kind 'text' instead"
            )
    else:
        paths = _match(name, config)
        root = type(paths[0])(os.path.commonpath([PurePath(*p.parent.parts) for p in paths]))
    files = [(p.relative_to(root).as_posix(), p) for p in paths]
    if config.kind == "python-library":
        return tuple(sorted(files, key=lambda file: (stable_key(file[0]), file[0]))[: config.limit])
    return tuple(sorted(files))


def _python_files(root: Path) -> Iterator[Path]:
    """Directories that are left out are not entered: installed packages can be many times the library."""
    for directory, below, files in os.walk(root):
        below[:] = set(below) - _LEFT_OUT
        yield from (Path(directory, file) for file in files if file.endswith(".py"))


def _match(name: str, config: SourceConfig) -> list[Path]:
    """The files of a source; what lies beside them and is not read is said."""
    pattern = place(config.path or "", f"data.sources.{name}.path =").expanduser()
    whole, endings = pattern.is_dir(), tuple(s + packed for s in _SUFFIXES[config.kind] for packed in _PACKED)
    found = pattern.rglob("*") if whole else [pattern] if pattern.is_file() else _glob(pattern)
    paths, rest = [], Counter[str]()
    for path in found:
        hidden = whole and any(part.startswith(".") for part in path.relative_to(pattern).parts)
        if path.is_dir():  # a link to one is not followed, which might never end
            rest["directory" if not whole else "linked directory"] += not whole or (path.is_symlink() and not hidden)
        elif whole and not path.name.lower().endswith(endings):
            rest[path.suffix.lower() or path.name.lower()] += not hidden
        elif hidden:
            rest["hidden"] += 1
        elif not path.is_file():
            what = "no file that can be read again" if path.exists() else "a link to a file that is not there"
            raise UserError(f"data.sources.{name}: {path} is {what}")
        elif config.kind == "jsonl" and not path.stat().st_size:
            rest["empty"] += 1
        else:
            paths.append(path.absolute())
    left = ", ".join(f"{count} {kind}" for kind, count in sorted(rest.items()) if count)
    if not paths:
        wanted = f" ({', '.join('*' + suffix for suffix in _SUFFIXES[config.kind])})" if whole else ""
        there = f"; what is there is not read: {left}" if left else ""
        raise UserError(
            f"data.sources.{name}.path = {config.path!r} matches no file{wanted}; give a file, directory or glob{there}"
        )
    if left:
        say_once(f"data.sources.{name}: of {pattern} is not read: {left}")
    return paths


def _glob(pattern: Path) -> Iterator[Path]:
    if is_remote(pattern):
        return pattern.parent.glob(pattern.name)
    return map(Path, glob.glob(str(pattern), recursive=True))


def _is_library(path: Path) -> bool:
    """UTF-8 with something in it, and not a record of how this interpreter was built, which differs by machine."""
    if path.name.startswith("_sysconfigdata") or path.parent.name.startswith("config-"):
        return False
    try:
        return bool(path.read_text("utf-8").strip())
    except UnicodeDecodeError:
        return False


def _read_text(path: Path) -> str:
    try:
        with open_plain(path) as file:
            content = read_at_most(MOST_TEXT, file)
        if content is None:
            raise UserError(f"{path} is longer than {MOST_TEXT} bytes; divide it or leave it out of the path")
        text = content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it or leave it out of the path") from None
    if "\0" in text:
        raise UserError(f"{path} is no text: it has zero bytes; leave it out of the path")
    if not text.strip():
        raise UserError(f"{path} is empty; leave it out of the path")
    return text


def _digest_jsonl(path: Path, digests: Digests) -> str:
    """Of the rows of a file and of the pictures that they name; files without any are not read again."""
    found = digests.of(f"rows and whether they name pictures {path}", [path], lambda: _digest_rows(path))
    if not found["pictures"]:
        return found["rows"]
    pictures = lambda: (picture for _, shown in _lines(path) for picture in shown)
    of_one = lru_cache(maxsize=4096)(_picture_digest)  # several rows may ask about a picture
    of_all = lambda: digest_of([of_one(picture) for picture in pictures()])
    return digest_of([found["rows"], digests.of(f"pictures {path}", pictures(), of_all)])


def _digest_rows(path: Path) -> dict[str, Any]:
    digest, any_pictures = hashlib.sha256(), False
    for line, pictures in _lines(path):
        digest.update(line.strip() + b"\n")
        any_pictures = any_pictures or bool(pictures)
    return {"rows": digest.hexdigest(), "pictures": any_pictures}


def _lines(path: Path) -> Iterator[tuple[bytes, list[Path]]]:
    """The rows of a file with the pictures that they name, of which a row that cannot be used has none."""
    for _, line in lines_of(path):
        pictures: list[Path] = []
        if b'"image' in line:  # parsing every row of a large text file would double the time to start
            for prompts in (True, False):  # an answer may be missing, and shows no images; a text is no prompt
                with suppress(UserError):
                    pictures.extend(_pictures(parse_row(line, path, "", "", prompts)))
                    break
        yield line, pictures


def _pictures(documents: tuple[Document, ...]) -> Iterator[Path]:
    for document in documents:
        parts = chain(document.parts, *(message.parts for message in document.messages))
        yield from (part for part in parts if isinstance(part, PurePath))


def _check_pictures(documents: tuple[Document, ...], where: str) -> None:
    for picture in _pictures(documents):
        if not picture.is_file():
            raise UserError(f"{where}: image {picture} does not exist")


def _picture_digest(path: Path) -> str | None:
    with suppress(OSError):
        return file_digest(path)
    return None
