"""Weights of FP8 (e4m3) with their scales, read as the numbers that they stand for.

A weight is its FP8 value times its scale, one of the whole tensor or one of every block of it; it is multiplied in
float32 and rounded once, as `transformers` does. Scales of activations say nothing of weights and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ministral_jax.errors import UserError
from ministral_jax.interop.safetensors import Tensor, pieces

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_SCALES = ("float32", "bfloat16", "float16")
_BLOCK = (128, 128)
"""What `transformers` takes where a configuration leaves the size out."""


@dataclass(frozen=True)
class Scaled:
    """A tensor of FP8 in a file and what it is to be multiplied by: float `[]`, or for blocks of `block` rows and
    columns `[rows / block, columns / block]`, both rounded up."""

    tensor: Tensor
    scale: Tensor
    block: tuple[int, int] | None

    @property
    def path(self) -> Path:
        return self.tensor.path

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def read(self, view: Callable[[np.ndarray], np.ndarray], index: Any, dtype: np.dtype) -> np.ndarray:
        """A part of the numbers: `index` of what `view` makes of the tensor. Of the file no more is read.

        Raises:
            UserError: a scale that is no number above 0.
        """
        scale = np.asarray(self.scale.read(), np.float32)
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise UserError(f"{self.path}: the scales of a tensor of FP8 {self.shape} are not all numbers above 0")
        codes = view(self.tensor.read())[index].view(np.uint8)
        if scale.size == 1:
            numbers = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32) * scale.reshape(())
            return _filled(codes, dtype, lambda here: numbers.astype(dtype)[codes[here]])
        assert self.block is not None
        rows, columns = (view(place)[index] for place in self._places())
        values = codes.view(E4M3)
        return _filled(codes, dtype, lambda here: values[here].astype(np.float32) * scale[rows[here], columns[here]])

    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """The row and the column of the block of every value; views of a number for each row and each column."""
        assert self.block is not None
        rows, columns = (np.arange(n) // size for n, size in zip(self.shape, self.block, strict=True))
        return np.broadcast_to(rows[:, None], self.shape), np.broadcast_to(columns, self.shape)


def _filled(like: np.ndarray, dtype: np.dtype, values: Callable[[Any], np.ndarray]) -> np.ndarray:
    out = np.empty(like.shape, dtype)
    for here in pieces(like):
        out[here] = values(here)
    return out


@dataclass(frozen=True)
class Names:
    """How the names of a weight, of its scale and of the scale of what it is multiplied with end in a format."""

    weight: str
    scale: str
    activation: str


HF_NAMES = Names(".weight", ".weight_scale_inv", ".activation_scale")


def block_size(config: Any, where: str) -> tuple[int, int] | None:
    """The blocks of a `quantization_config` of `transformers`, None for one scale per tensor.

    Raises:
        UserError: another method than fp8, or values that it does not have.
    """
    if (method := config.get("quant_method") if isinstance(config, dict) else config) != "fp8":
        raise UserError(
            f"{where}: weights are quantised ({method!s:.40}); those of fp8 can be read, or take the BF16 variant"
        )
    if not isinstance(config, dict):
        raise UserError(f"{where}: quantization_config is {config!r:.80}, expected an object")
    if (scheme := config.get("activation_scheme", "dynamic")) not in ("static", "dynamic"):
        raise UserError(f"{where}: quantization_config.activation_scheme is {scheme!r:.80}, expected static or dynamic")
    size = config.get("weight_block_size", _BLOCK)
    if size is None:
        return None
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise UserError(
            f"{where}: quantization_config.weight_block_size is {size!r:.80}, expected null or rows and columns of a "
            "block"
        )
    return size[0], size[1]


def with_scales(
    tensors: Mapping[str, Tensor], names: Names, block: tuple[int, int] | None, where: str
) -> dict[str, Tensor | Scaled]:
    """The tensors of a checkpoint found at `where`, those of FP8 joined with their scales, all others as they are.

    Raises:
        UserError: a tensor of FP8 without a scale, a scale of another shape, or one of a tensor that is not of FP8.
    """
    found: dict[str, Tensor | Scaled] = {}
    for name, tensor in tensors.items():
        base = next((name.removesuffix(end) for end in (names.scale, names.activation) if name.endswith(end)), None)
        if base is not None and (weight := tensors.get(base + names.weight)) is not None:
            if name.endswith(names.scale) and weight.dtype != E4M3:
                raise UserError(f"{where}: {name} is a scale, but {base}{names.weight} is {weight.dtype.name}")
        elif tensor.dtype == E4M3:
            scale = tensors.get(name.removesuffix(names.weight) + names.scale)
            if scale is None:
                raise UserError(f"{where}: {name} is FP8 and lacks its scale {names.scale.lstrip('.')}")
            found[name] = _checked(name, Scaled(tensor, scale, block), where)
        else:
            found[name] = tensor
    return found


def _checked(name: str, found: Scaled, where: str) -> Scaled:
    scale = found.scale
    if scale.dtype.name not in _SCALES:
        raise UserError(f"{where}: the scale of {name} is {scale.dtype.name}; {', '.join(_SCALES)} can be read")
    accepted = "one number"
    if scale.shape in ((), (1,), (1, 1)):
        return found
    if found.block is not None and len(found.shape) == 2:
        grid = tuple(-(-n // size) for n, size in zip(found.shape, found.block, strict=True))
        if scale.shape == grid:
            return found
        accepted = f"{grid} for blocks of {found.block}"
    raise UserError(f"{where}: the scale of {name} {found.shape} has shape {scale.shape}, expected {accepted}")
