"""Safetensors files, written and read one tensor at a time, bfloat16 and float8 included.

The format: 8 bytes little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, then the raw data.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ministral_jax.errors import UserError
from ministral_jax.files import MOST_JSON, is_remote, parse_object, read_object, refuse_pointer

_DTYPES = {
    **{f"{kind}{8 * size}".upper(): np.dtype(f"{kind}{size}") for kind in "iuf" for size in (8, 4, 2)},
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor that lies in a file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Its values, mapped from the file rather than copied."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


@dataclass(frozen=True)
class Pending:
    """A tensor that is to be written; `value` is called when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    value: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


_BLOCK = 2**21
"""Bytes of a tensor that are copied at once; a cache holds them."""
_ROWS = 2**26
"""Bytes of a tensor that are written at once."""


def pieces(value: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """Indices of blocks of an array, one after another as they lie in memory."""
    if value.size:
        axis = int(np.argmax(value.strides))  # the outermost in memory
        step = max(1, _BLOCK // max(value.strides[axis], 1))
        for first in range(0, value.shape[axis], step):
            yield (*[slice(None)] * axis, slice(first, first + step))


def packed(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy in `dtype` with its axes in order in memory; of a view with its axes turned, five times as fast as NumPy's
    own."""
    out = np.empty(value.shape, dtype)
    for here in pieces(value):
        out[here] = value[here]
    return out


def _blocks(value: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """`packed`, some rows at a time."""
    rows = np.atleast_1d(value)
    step = max(1, _ROWS * len(rows) // max(rows.nbytes, 1))
    for first in range(0, len(rows), step):
        yield packed(rows[first : first + step], dtype)


def write(path: Path, tensors: Iterable[Pending], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` to `path`, with one of them in memory at a time, and of its copy in another dtype or order a
    block."""
    tensors = list(tensors)
    header: dict = {"__metadata__": metadata} if metadata else {}
    end = 0
    for t in tensors:
        header[t.name] = dict(dtype=_NAMES[t.dtype], shape=list(t.shape), data_offsets=[end, end + t.bytes])
        end += t.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for t in tensors:
            value = t.value()
            assert value.shape == t.shape, (t.name, value.shape, t.shape)
            for block in _blocks(value, t.dtype):
                file.write(block.reshape(-1).view(np.uint8).data)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; only its header is read, and all that it says is checked before anything is
    mapped. Raises `UserError`: the file is cut short, of no such format or a link out of its directory, or its tensors
    do not fill it exactly, one after the other."""
    _refuse_outside(path)
    header, start = _header(path)
    tensors = {name: _tensor(path, name, entry, start) for name, entry in header.items() if name != _FREE}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if tensor.offset != end:
            what = "overlaps the one before it" if tensor.offset < end else "leaves bytes before it that are of none"
            raise UserError(f"{path}: {_INVALID}: tensor {name!r:.80} {what}")
        end += tensor.bytes
    size = path.stat().st_size
    if end > size:
        raise UserError(f"{path}: cut short, {size} bytes where its header promises {end}")
    if end < size:
        raise UserError(f"{path}: {_INVALID}: the last {size - end} bytes of the file are of no tensor")
    return tensors


_NAME = re.compile(r"[ -.0-\[\]-~]{1,240}\.safetensors")
"""Of a file in an index: printable ASCII without the two slashes."""


def named_files(index: Path) -> list[str]:
    """The files that an index names, sorted. Raises `UserError`: it is none, or a name is not that of a file beside
    it."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{index}: not a valid index: weight_map is {names!r:.80}, expected files by tensor")
    for name in names.values():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(f"{index}: not a valid index: {name!r:.80} is no name of a .safetensors file beside it")
    return sorted(set(names.values()))


def _refuse_outside(file: Path) -> None:
    """Raises `UserError`: a file is a link out of its directory. In a cache of huggingface_hub what a snapshot holds
    are links to blobs beside it."""
    if is_remote(file):
        return
    home = file.parent.resolve()
    home = home.parent.parent if home.parent.name == "snapshots" else home
    if not file.resolve().is_relative_to(home):
        raise UserError(f"{file} is a link out of its directory; put the file itself there")


def metadata(path: Path) -> dict[str, str]:
    """The file's free-form metadata. Raises `UserError`: it is cut short or of no such format."""
    return _header(path)[0].get(_FREE) or {}


_FREE = "__metadata__"
_INVALID = "not a valid safetensors header"
_MOST_AXES = 64
"""What NumPy can have."""
_LONGEST_NAME = 256


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The parsed header and where the data start."""
    refuse_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise UserError(f"{path}: not a safetensors file, or cut short: {size} bytes, header of {length}")
        if length > MOST_JSON:
            raise UserError(f"{path}: {_INVALID}: it has {length} bytes, at most {MOST_JSON} can be read")
        header = parse_object(file.read(length), f"{path}: {_INVALID}")
    free = header.get(_FREE)
    if free is not None and not (isinstance(free, dict) and all(isinstance(text, str) for text in free.values())):
        raise UserError(f"{path}: {_INVALID}: {_FREE} is {free!r:.80}, expected texts by name")
    return header, 8 + length


def _tensor(path: Path, name: str, entry: Any, start: int) -> Tensor:
    """What a header says of a tensor, checked by itself."""
    where = f"{path}: {_INVALID}: tensor {name!r:.80}"
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise UserError(f"{where} is no name of at most {_LONGEST_NAME} printable characters")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise UserError(f"{where} is {entry!r:.80}, expected dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise UserError(f"{where} has dtype {kind!r:.40}; {', '.join(_DTYPES)} can be read")
    if not _are_sizes(shape) or len(shape) > _MOST_AXES:
        raise UserError(f"{where} has shape {shape!r:.80}, expected at most {_MOST_AXES} whole numbers from 0")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise UserError(f"{where} has data_offsets {offsets!r:.80}, expected where it begins and where it ends")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize or math.prod(filter(None, shape)) >= 2**60:
        raise UserError(f"{where} has {end - begin} bytes, not those of {kind} {shape!r:.80}")
    return Tensor(path, dtype, tuple(shape), start + begin)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
