"""Safetensors files, written and read one tensor at a time, bfloat16 and float8 included.

The format: 8 bytes little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, then the raw data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from ministral_jax.errors import UserError
from ministral_jax.files import refuse_pointer

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
    """The tensors of a file by name; only its header is read. Raises `UserError` for one cut short or of no such
    format."""
    header, start = _header(path)
    header.pop("__metadata__", None)
    tensors, end = {}, start
    try:
        for name, entry in header.items():
            dtype, shape, (begin, stop) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if stop - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has {stop - begin} bytes")
            tensors[name] = Tensor(path, dtype, shape, start + begin)
            end = max(end, start + stop)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a valid safetensors header: {error!r}") from None
    if end > path.stat().st_size:
        raise UserError(f"{path}: cut short, {path.stat().st_size} bytes where its header promises {end}")
    return tensors


def metadata(path: Path) -> dict[str, str]:
    """The file's free-form metadata. Raises `UserError` as `read`."""
    return _header(path)[0].get("__metadata__", {})


def _header(path: Path) -> tuple[dict, int]:
    """The parsed header and where the data start."""
    refuse_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise UserError(f"{path}: not a safetensors file, or cut short: {size} bytes, header of {length}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"{path}: not a valid safetensors header: {error!r}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: not a valid safetensors header: expected an object")
    return header, 8 + length
