"""Where documents come from. Everything is read in an order that depends on names alone."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any

from ministral_jax.console import say
from ministral_jax.data.config import SourceConfig
from ministral_jax.data.conversation import Document
from ministral_jax.data.jsonl import json_row, lines_of, parse_row
from ministral_jax.data.tasks import KINDS, read_task, task_digest
from ministral_jax.errors import UserError
from ministral_jax.files import digest_of, open_plain, stable_key

# Tests and bundled packages are not the library; the encodings are tables of code points.
_LEFT_OUT = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "site-packages", "dist-packages", "encodings"}
_SUFFIXES = {"text": (".txt", ".md"), "jsonl": (".jsonl", ".ndjson")}
_PACKED = ("", ".gz", ".bz2", ".xz")


@dataclass(frozen=True)
class Source:
    """A source whose files exist. `digest` changes with anything that changes its documents."""

    name: str
    config: SourceConfig
    files: tuple[tuple[str, Path], ...]
    """(name, path), the name relative to the files' common directory."""
    digest: str


def open_source(name: str, config: SourceConfig) -> Source:
    """List the files of a source and digest their content; an image named by a JSONL row counts by its size. Raises
    `UserError`: no file matches, or a JSONL row that names an image is malformed or its image missing."""
    files = _list_files(name, config)
    if config.kind in KINDS:
        content: Any = task_digest(config)
    elif config.kind == "jsonl":
        content = [(relative, _digest_jsonl(path)) for relative, path in files]
    else:
        content = [(relative, hashlib.sha256(path.read_bytes()).hexdigest()) for relative, path in files]
    return Source(name, config, files, digest_of([config.kind, config.limit, content]))


def read_documents(source: Source, prompts: bool = False) -> Iterator[Document]:
    """The documents of a source, one at a time; images of files are still paths.

    As `prompts`, conversations end with what is to be answered; the last answer, where there is one, is left out.

    Raises:
        UserError: naming the file and the row: text that is empty or not UTF-8, or a row that is malformed; plain text
            where prompts are wanted.
    """
    kind, limit = source.config.kind, source.config.limit
    if prompts and kind in ("text", "python-library"):
        raise UserError(f"data.sources.{source.name} is plain text, of kind {kind!r}: it has no prompts to be answered")
    if kind in KINDS:
        yield from read_task(source.config, prompts)
    elif kind == "jsonl":
        rows = ((relative, path, n, line) for relative, path in source.files for n, line in lines_of(path))
        for relative, path, n, line in islice(rows, limit):
            yield from parse_row(line, path, f"{relative}:{n}", f"{path} row {n}", prompts)
    else:
        for relative, path in source.files:
            yield Document(relative, str(path), text=_read_text(path))


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
        root = Path(os.path.commonpath([p.parent for p in paths]))
    files = [(p.relative_to(root).as_posix(), p) for p in paths]
    if config.kind == "jsonl":
        return tuple(sorted(files))
    # In the order of a hash, so that the first `limit` are a fair sample and not the beginning of the alphabet.
    return tuple(sorted(files, key=lambda file: (stable_key(file[0]), file[0]))[: config.limit])


def _python_files(root: Path) -> Iterator[Path]:
    """Directories that are left out are not entered: installed packages can be many times the library."""
    for directory, below, files in os.walk(root):
        below[:] = set(below) - _LEFT_OUT
        yield from (Path(directory, file) for file in files if file.endswith(".py"))


def _match(name: str, config: SourceConfig) -> list[Path]:
    pattern, wanted = Path(config.path or "").expanduser(), ""
    if pattern.is_dir():
        suffixes = _SUFFIXES[config.kind]
        endings = tuple(suffix + packed for suffix in suffixes for packed in _PACKED)
        files = [p for p in pattern.rglob("*") if p.is_file()]
        paths = [p for p in files if p.name.lower().endswith(endings)]
        wanted = f" ({', '.join('*' + suffix for suffix in suffixes)})"
        rest = [p for p in files if not p.name.lower().endswith(endings) and not p.name.startswith(".")]
        if paths and rest:
            kinds = sorted(Counter(p.suffix.lower() or p.name.lower() for p in rest).items())
            left = ", ".join(f"{count} {kind}" for kind, count in kinds)
            _say_once(f"data.sources.{name}: of {pattern} is not read: {left}")
    else:
        paths = [pattern] if pattern.is_file() else [Path(p) for p in glob.glob(str(pattern), recursive=True)]
    paths = [p.absolute() for p in paths if p.is_file()]
    if not paths:
        raise UserError(
            f"data.sources.{name}.path = {config.path!r} matches no file{wanted}; give a file, directory or glob"
        )
    return paths


@cache  # every stage looks
def _say_once(text: str) -> None:
    say(text)


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
            text = TextIOWrapper(file, "utf-8").read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it or leave it out of the path") from None
    if not text.strip():
        raise UserError(f"{path} is empty; leave it out of the path")
    return text


def _digest_jsonl(path: Path) -> str:
    digest = hashlib.sha256()
    for n, line in lines_of(path):
        digest.update(line)
        if b'"image' not in line:  # parsing every row of a large text file would double the time to start
            continue
        row = json_row(line, where := f"{path} row {n}")
        if isinstance(row, dict) and row.get("text") is not None and row.get("messages") is None:
            continue
        # with or without an answer: its images are the user's
        (document,) = parse_row(line, path, "", where, prompts=True)
        for image in (part for message in document.messages for part in message.parts if isinstance(part, Path)):
            if not image.is_file():
                raise UserError(f"{where}: image {image} does not exist")
            digest.update(str(image.stat().st_size).encode())
    return digest.hexdigest()
