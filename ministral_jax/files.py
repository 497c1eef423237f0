"""Files and directories that appear complete or not at all, and identities that do not change from run to run."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from ministral_jax.errors import UserError

_COMPRESSED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_REFUSED = {
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; decompress it",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"PAR1": "is Parquet; write its rows as JSON lines",
    b"\xff\xfe\0\0": "is UTF-32; convert it to UTF-8",
    b"\0\0\xfe\xff": "is UTF-32; convert it to UTF-8",
    b"\xff\xfe": "is UTF-16; convert it to UTF-8",
    b"\xfe\xff": "is UTF-16; convert it to UTF-8",
}
_POINTER = b"version https://git-lfs.github.com/spec/"
MOST_JSON = 100_000_000
"""Bytes of a JSON value that is read at once: in memory it is many times as large. safetensors itself has this bound
for a header."""


def is_remote(path: Path) -> bool:
    """Whether it lies in an object store (a `buckets.BucketPath`), where objects are written whole."""
    return not isinstance(path, Path)


def refuse_pointer(path: Path, what: str = "") -> None:
    """Raises `UserError`: the file, `what` in messages, is what Git LFS leaves in the place of a large one."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{what or path} is a Git LFS pointer, not the file itself; run `git lfs pull`")


@contextmanager
def open_plain(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a UTF-8 text, without a byte order mark; gzip, bzip2 and xz are decompressed.

    Raises:
        UserError: another compression or encoding, a Git LFS pointer, or a compressed file that is damaged.
    """
    refuse_pointer(path)
    with path.open("rb") as file:
        head = file.read(8)
    opened = next((opened for magic, opened in _COMPRESSED.items() if head.startswith(magic)), None)
    try:
        with path.open("rb") as packed, opened(packed, "rb") if opened else packed as file:
            head = file.read(8)
            for magic, why in _REFUSED.items():
                if head.startswith(magic):
                    raise UserError(f"{path} {why}")
            if opened is not None and head.startswith(tuple(_COMPRESSED)):
                raise UserError(f"{path} is compressed twice; decompress it")
            if b"\0" in head[:4] and not head.startswith(tuple(_COMPRESSED)):
                raise UserError(f"{path} begins with zero bytes, as UTF-16 does; convert it to UTF-8")
            file.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
            # a bucket's file has no `readline` of so many bytes at most; Any: what reads is no `IO` to a type checker
            plain: Any = file if isinstance(file, io.BufferedIOBase) else io.BufferedReader(cast(Any, file))
            yield plain
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} is damaged or cut short ({error})") from None
    except OSError as error:
        if opened is None or error.errno is not None:
            raise
        raise UserError(f"{path} is damaged or cut short ({error})") from None  # bzip2 says it so


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds, as `open_plain` opens it. Raises `UserError`: as there and in `parse_object`,
    or there are more than `MOST_JSON` bytes, unpacked."""
    with open_plain(path) as file:
        content = read_at_most(MOST_JSON, file)
    if content is None:
        raise UserError(f"{path} holds more than {MOST_JSON} bytes of JSON, which is no configuration or index")
    return parse_object(content, str(path))


def read_at_most(most: int, file: IO[bytes]) -> bytes | None:
    """All that is left of a file; None where that is more than `most` bytes. No more is allocated than is there."""
    content = bytearray()
    while piece := file.read(min(2**20, most + 1 - len(content))):
        content += piece
    return bytes(content) if len(content) <= most else None


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object in UTF-8. Raises `UserError`: none, or one of which a key stands twice; begins with `where`."""
    try:
        found = json.loads(content.decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected a JSON object")
    return found


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values, for `json`, which would keep the last of each. Raises `ValueError`: one stands
    twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r:.80} stands twice")
    return found


def digest_of(record: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stable_key(name: str) -> int:
    """64 uniform bits that a name always gives, on any machine."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a crash, never meets half of it."""
    if is_remote(path):
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file; lines that are not JSON objects, such as a last one torn by a kill, are left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict)]


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """For few lines: in a bucket the whole file is written anew; see `places.Lines`."""
    line = json.dumps(record) + "\n"
    if is_remote(path):
        write_text(path, (path.read_text(encoding="utf-8") if path.is_file() else "") + line)
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
