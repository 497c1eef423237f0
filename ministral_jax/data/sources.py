"""Where documents come from. Everything is read in an order that depends on names alone.

A JSONL row is one of `{"text": ..}`, `{"question": .., "answer": .., "image": path or "images": [path, ..]}` (images
optional) and `{"messages": [..]}` (see `chat.parse_messages`); other keys are ignored, blank lines skipped. Image paths
are relative to the JSONL file.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ministral_jax.data.chat import Message, image_path, parse_messages
from ministral_jax.data.config import SourceConfig
from ministral_jax.data.files import digest_of, stable_key
from ministral_jax.errors import UserError

DIGIT_QUESTION = "Digit?"
"""Short, because every token of the tiny recipe is paid for on a CPU: the whole exchange is 15 tokens."""

# Tests and bundled packages are not the library; the encodings are tables of code points.
_LEFT_OUT = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "site-packages", "dist-packages", "encodings"}
_SUFFIXES = {"text": (".txt", ".md"), "jsonl": (".jsonl",)}


@dataclass(frozen=True)
class Document:
    """Plain `text`, or a conversation of `messages`. `name` is unique and stable; `where` is for error messages."""

    name: str
    where: str
    text: str | None = None
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Source:
    """A source whose files exist. `digest` changes with anything that changes its documents."""

    name: str
    config: SourceConfig
    files: tuple[tuple[str, Path], ...]
    """(name, path), the name relative to the files' common directory."""
    digest: str


def open_source(name: str, config: SourceConfig) -> Source:
    """List the files of a source and digest their content; an image named by a JSONL row counts by its size.

    Raises:
        UserError: no file matches, or a JSONL row that names an image is malformed or its image missing.
    """
    files = _list_files(name, config)
    if config.kind == "digits":
        content: Any = hashlib.sha256(_digits()[0].tobytes()).hexdigest()
    elif config.kind == "jsonl":
        content = [(relative, _digest_jsonl(path)) for relative, path in files]
    else:
        content = [(relative, hashlib.sha256(path.read_bytes()).hexdigest()) for relative, path in files]
    return Source(name, config, files, digest_of([config.kind, config.limit, content]))


def read_documents(source: Source) -> Iterator[Document]:
    """The documents of a source, one at a time; images are still paths.

    Raises:
        UserError: naming the file and the row: text that is empty or not UTF-8, or a row that is malformed.
    """
    kind, limit = source.config.kind, source.config.limit
    if kind == "digits":
        yield from _read_digits(limit)
    elif kind == "jsonl":
        rows = ((relative, path, n, line) for relative, path in source.files for n, line in _lines(path))
        for relative, path, n, line in islice(rows, limit):
            yield _parse_row(line, path, f"{relative}:{n}", f"{path} row {n}")
    else:
        for relative, path in source.files:
            yield Document(relative, str(path), text=_read_text(path))


def _list_files(name: str, config: SourceConfig) -> tuple[tuple[str, Path], ...]:
    if config.kind == "digits":
        return ()
    if config.kind == "python-library":
        root = Path(sysconfig.get_path("stdlib"))
        paths = [p for p in root.rglob("*.py") if not _LEFT_OUT & set(p.relative_to(root).parts) and _is_library(p)]
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


def _match(name: str, config: SourceConfig) -> list[Path]:
    assert config.path is not None
    pattern = Path(config.path).expanduser()
    if pattern.is_dir():
        paths = [p for p in pattern.rglob("*") if p.suffix in _SUFFIXES[config.kind]]
        wanted = f" ({', '.join('*' + suffix for suffix in _SUFFIXES[config.kind])})"
    else:
        paths = [pattern] if pattern.is_file() else [Path(p) for p in glob.glob(str(pattern), recursive=True)]
        wanted = ""
    paths = [p.absolute() for p in paths if p.is_file()]
    if not paths:
        raise UserError(
            f"data.sources.{name}.path = {config.path!r} matches no file{wanted}; give a file, directory or glob"
        )
    return paths


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
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it or leave it out of the path") from None
    if not text.strip():
        raise UserError(f"{path} is empty; leave it out of the path")
    return text


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(row number from 1, content) of the lines that are not blank."""
    with path.open("rb") as file:
        for n, line in enumerate(file, 1):
            if line.strip():
                yield n, line


def _digest_jsonl(path: Path) -> str:
    digest = hashlib.sha256()
    for n, line in _lines(path):
        digest.update(line)
        if b'"image' in line:  # parsing every row of a large text file for this would double the time to start
            where = f"{path} row {n}"
            for message in _parse_row(line, path, "", where).messages:
                for part in message.parts:
                    if isinstance(part, Path):
                        if not part.is_file():
                            raise UserError(f"{where}: image {part} does not exist")
                        digest.update(str(part.stat().st_size).encode())
    return digest.hexdigest()


def json_row(line: bytes, where: str) -> Any:
    """The value of a row of JSONL.

    Raises:
        UserError: it is not UTF-8 or not JSON.
    """
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start} of the row)") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def _parse_row(line: bytes, path: Path, name: str, where: str) -> Document:
    row = json_row(line, where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be an object, got {str(row)[:40]}")
    if "messages" in row:
        return Document(name, where, messages=parse_messages(row["messages"], path.parent, where))
    if "text" in row:
        return Document(name, where, text=_string(row, "text", where))
    if "question" in row and "answer" in row:
        images = row["images"] if "images" in row else [row["image"]] if "image" in row else []
        if not isinstance(images, list):
            raise UserError(f"{where}: 'images' must be a list of paths, got {images!r}")
        parts = (*(image_path(image, path.parent, where) for image in images), _string(row, "question", where))
        return Document(name, where, messages=_exchange(parts, _string(row, "answer", where)))
    raise UserError(f"{where}: has {sorted(row)} but needs 'text', 'messages', or 'question' and 'answer'")


def _string(row: dict[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key!r} must be text that is not empty, got {value!r}")
    return value


def _exchange(question: tuple[Any, ...], answer: str) -> tuple[Message, ...]:
    return Message("user", question), Message("assistant", (answer,))


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """uint8 images `[N, 8, 8]` scaled from 0..16 to 0..255, and labels `[N]`."""
    from sklearn.datasets import load_digits  # a second to import, and only this source needs it

    pixels, labels = load_digits(return_X_y=True)
    return (pixels.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8), labels


def _read_digits(limit: int | None) -> Iterator[Document]:
    images, labels = _digits()
    names = [f"digit-{n:04d}" for n in range(len(labels))]
    for n in sorted(range(len(names)), key=lambda n: stable_key(names[n]))[:limit]:
        picture = Image.fromarray(np.repeat(images[n][:, :, None], 3, axis=2))
        yield Document(names[n], names[n], messages=_exchange((picture, DIGIT_QUESTION), str(labels[n])))
