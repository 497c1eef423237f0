"""Where documents come from. Everything is read in an order that depends on names alone.

A JSONL row is one of `{"text": ..}`, `{"question": .., "answer": .., "image": path or "images": [path, ..]}` (images
optional), `{"messages": [..], "tools": [..]}` (tools optional; see `conversation.parse_messages`) and `{"prompt" or
"messages": .., "chosen": .., "rejected": ..}`, two answers of which one is better, which gives a judge's two documents;
other keys are the document's columns, blank lines skipped. Read as prompts, a row ends before its answer, may have
none, and may be `{"prompt": text or messages}`. Image paths are relative to the JSONL file.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ministral_jax.data.config import SourceConfig
from ministral_jax.data.conversation import Document, Message, image_path, parse_messages, parse_tools, spell
from ministral_jax.data.pairwise import judge_documents
from ministral_jax.data.tasks import KINDS, exchange, read_task, task_digest
from ministral_jax.errors import UserError
from ministral_jax.files import digest_of, stable_key

# Tests and bundled packages are not the library; the encodings are tables of code points.
_LEFT_OUT = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "site-packages", "dist-packages", "encodings"}
_SUFFIXES = {"text": (".txt", ".md"), "jsonl": (".jsonl",)}


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
        paths = [p for p in pattern.rglob("*") if p.suffix in _SUFFIXES[config.kind]]
        wanted = f" ({', '.join('*' + suffix for suffix in _SUFFIXES[config.kind])})"
    else:
        paths = [pattern] if pattern.is_file() else [Path(p) for p in glob.glob(str(pattern), recursive=True)]
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


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """(row number from 1, content) of the lines that are not blank."""
    with path.open("rb") as file:
        for n, line in enumerate(file, 1):
            if line.strip():
                yield n, line


def _digest_jsonl(path: Path) -> str:
    digest = hashlib.sha256()
    for n, line in lines_of(path):
        digest.update(line)
        if b'"image' not in line:  # parsing every row of a large text file would double the time to start
            continue
        row = json_row(line, where := f"{path} row {n}")
        if isinstance(row, dict) and "text" in row and "messages" not in row:
            continue
        # with or without an answer: its images are the user's
        (document,) = parse_row(line, path, "", where, prompts=True)
        for image in (part for message in document.messages for part in message.parts if isinstance(part, Path)):
            if not image.is_file():
                raise UserError(f"{where}: image {image} does not exist")
            digest.update(str(image.stat().st_size).encode())
    return digest.hexdigest()


def json_row(line: bytes, where: str) -> Any:
    """The value of a row of JSONL; `UserError` where it is not UTF-8 or not JSON."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start} of the row)") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def parse_row(line: bytes, path: Path, name: str, where: str, prompts: bool) -> tuple[Document, ...]:
    """The documents of a row of the JSONL file at `path`: two of a pair of answers, else one. Raises `UserError`: the
    row is malformed; begins with `where`."""
    row = json_row(line, where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be an object, got {str(row)[:40]}")
    tools: tuple[dict[str, Any], ...] = ()
    text, messages, base = None, (), path.parent
    compared = not prompts and {"chosen", "rejected"} <= row.keys()
    if "messages" in row or ((prompts or compared) and "prompt" in row):
        used, given = {"messages", "prompt", "tools"}, row.get("messages", row.get("prompt"))
        if "messages" in row or isinstance(given, list):
            messages = parse_messages(given, base, where, prompts or compared)
        else:
            messages = (Message("user", (*_images(row, base, where), _string(row, "prompt", where))),)
        tools = parse_tools(row.get("tools") or [], where)
    elif "text" in row and not prompts:
        used, text = {"text"}, _string(row, "text", where)
    elif "question" in row and "answer" in row:
        used, question = {"question"}, (*_images(row, base, where), _string(row, "question", where))
        messages = exchange(question, _string(row, "answer", where))[: 1 if prompts else 2]
    else:
        if not prompts and "prompt" in row and (lone := {"chosen", "rejected"} & row.keys()):
            (missing,) = {"chosen", "rejected"} - lone
            raise UserError(f"{where}: has {lone.pop()!r} but no {missing!r}; a pair needs both")
        needed = "'messages', 'prompt'" if prompts else "'text', 'messages'"
        raise UserError(f"{where}: has {sorted(row)} but needs {needed}, or 'question' and 'answer'")
    columns = {key: value for key, value in row.items() if key not in used}
    document = Document(name, where, text, messages, tools, columns)
    return judge_documents(document, *_compared(row, where)) if compared and "messages" in used else (document,)


def _images(row: dict[str, Any], base: Path, where: str) -> tuple[Path, ...]:
    images = row["images"] if "images" in row else [row["image"]] if "image" in row else []
    if not isinstance(images, list):
        raise UserError(f"{where}: 'images' must be a list of paths, got {images!r}")
    return tuple(image_path(image, base, where) for image in images)


def _compared(row: dict[str, Any], where: str) -> tuple[str, str]:
    """The texts of the chosen and the rejected answer, which may be given as the assistant's message alone."""
    texts, opening = {}, {"role": "user", "content": "?"}
    for key in ("chosen", "rejected"):
        value = row[key]
        if isinstance(value, list):
            value = spell(parse_messages([opening, *value], Path(), f"{where}: {key}")[-1], thinking=False)
        texts[key] = _string({key: value}, key, where)
    if texts["chosen"] == texts["rejected"]:
        raise UserError(f"{where}: chosen and rejected are the same, {texts['chosen'][:40]!r}; leave the row out")
    return texts["chosen"], texts["rejected"]


def _string(row: dict[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key!r} must be text that is not empty, got {value!r}")
    return value
