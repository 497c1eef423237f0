"""Ways to spoil a valid file: its bytes, or the JSON that it holds."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

_SCALARS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 10**30, -(2**63), -(10**30)),
    *(0.5, 1.0, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *(None, True, False, "", "x", "0", "-1", "nan", "/", "..", "../../etc/passwd", "\0", "\ud800", "\n", "é" * 300),
    *([], {}, [[]], [0], [None], [{}], {"": 0}, {"x": []}, [1] * 70, "y" * 5000),
)  # fmt: skip
_BLANKS = gzip.compress(bytes(2**24), 1)


def damaged(content: bytes, random: Random) -> bytes:
    """Bits flipped, bytes cut, doubled, exchanged or put in."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 5, 20))):
        at, size = random.randrange(len(data) + 1), random.choice((1, 1, 2, 4, 8, 64, len(data)))
        match random.randrange(8):
            case 0 | 1:
                if at < len(data):
                    data[at] ^= 1 << random.randrange(8)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + size]
            case 4:
                data[at:at] = data[at : at + size]
            case 5:
                data[at : at + size] = random.randbytes(min(size, 64))
            case 6:
                data[at : at + 4] = struct.pack(random.choice("<>") + "I", random.choice((0, 1, 2**31, 2**32 - 1)))
            case 7:
                data[at : at + 8] = struct.pack("<Q", random.choice((0, 2**16, 2**40, 2**63, 2**64 - 1)))
    return bytes(data)


def wrapped(content: bytes, random: Random) -> bytes:
    """Something else in its place: nothing, another format, or a gibibyte of zeros that is packed."""
    return random.choice(
        (b"", b"\0" * 16, b"\xff\xfe" + content.decode("latin-1").encode("utf-16-le"), gzip.compress(content)[:-9],
         gzip.compress(content), _BLANKS * 64, b"PK\x03\x04" + content, b"\xef\xbb\xbf" + content, b"{}", b"[]",
         b"version https://git-lfs.github.com/spec/v1\n" + content[:40])
    )  # fmt: skip


def spoilt_json(content: bytes, random: Random) -> bytes:
    """A value of the JSON is another, or of another type; keys are gone, doubled or renamed; deep nesting."""
    if random.random() < 0.15:
        return damaged(content, random)
    if random.random() < 0.05:
        return wrapped(content, random)
    value = json.loads(content)
    for _ in range(random.choice((1, 1, 1, 1, 2, 4))):
        value = _spoilt(value, random)
    text = json.dumps(value)
    if random.random() < 0.1:  # a key twice, or one that nobody asked for
        keys = [piece for piece in text.split('"') if piece.isidentifier()] or ["x"]
        text = text.replace("{", f'{{"{random.choice(keys)}": {json.dumps(random.choice(_SCALARS))}, ', 1)
    if random.random() < 0.05:
        depth = random.choice((100, 5000, 200_000))
        text = text.replace(": ", ": " + random.choice(("[", '{"a":')) * depth, random.choice((1, 3)))
    return text.encode()


def _spoilt(value: Any, random: Random) -> Any:
    """One change, somewhere in it."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(list(value))
        match random.randrange(10):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {(random.choice(("", "x", key.upper(), key + "s", "\ud800", "__proto__")) if k == key else k): v
                        for k, v in value.items()}  # fmt: skip
            case 2:
                return {**value, key: value[random.choice(list(value))]}
            case _:
                return {**value, key: _spoilt(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.85:
        at = random.randrange(len(value))
        match random.randrange(8):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value, value[at]]
            case 2:
                return value[::-1]
            case _:
                return [*value[:at], _spoilt(value[at], random), *value[at + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and random.random() < 0.4:
        return random.choice((value + 1, value - 1, -value, value * 2, value * 2**40, float(value), str(value)))
    return random.choice(_SCALARS)


def spoilt_safetensors(content: bytes, random: Random) -> bytes:
    """The header's JSON spoilt with the length before it right, or bytes damaged."""
    if random.random() < 0.25:
        return damaged(content[:random.choice((16, 200, len(content)))], random)  # fmt: skip
    size = int.from_bytes(content[:8], "little")
    header = spoilt_json(content[8 : 8 + size].rstrip(), random)
    length = len(header) if random.random() < 0.9 else random.choice((0, 1, 2**20, 2**40, 2**64 - 1))
    return struct.pack("<Q", length) + header + content[8 + size :]


def spoilt_rows(content: bytes, random: Random) -> bytes:
    """One row of JSONL."""
    if random.random() < 0.05:
        return wrapped(content, random)
    rows = content.splitlines()
    at = random.randrange(len(rows))
    return b"\n".join([*rows[:at], spoilt_json(rows[at], random), *rows[at + 1 :]]) + b"\n"


def spoilt_image(content: bytes, random: Random) -> bytes:
    """Bytes damaged, of a PNG also its size with a right checksum."""
    if content.startswith(b"\x89PNG") and random.random() < 0.3:
        sizes = (0, 1, 9000, 2**14, 2**16, 2**31 - 1, 2**32 - 1)
        kind = random.choice((8, 8, 1, 16)), random.choice((2, 2, 0, 3, 6))
        head = b"IHDR" + struct.pack(">II", random.choice(sizes), random.choice(sizes)) + bytes(kind) + b"\0\0\0"
        return content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]
    if random.random() < 0.3:  # where the formats have their sizes
        return damaged(content[:64], random) + content[64:]
    return damaged(content, random) if random.random() < 0.95 else wrapped(content, random)
