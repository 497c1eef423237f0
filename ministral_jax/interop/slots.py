"""Where the tensors of a checkpoint's files lie in our parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from ministral_jax.distributed.collectives import fetch
from ministral_jax.errors import UserError
from ministral_jax.interop.fp8_weights import Scaled
from ministral_jax.interop.safetensors import Tensor
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import Params

Table = Mapping[str, tuple[str, str]]
"""Our parameter -> a format's tensor and how its axes move. {} is the layer. Letters are sizes, see `_sizes`."""

HALVES = {
    "decoder/embed": "V D -> V D",
    "decoder/layers/attention_norm": "D -> D",
    "decoder/layers/attention/q": "D H h -> (H h) D",
    "decoder/layers/attention/k": "D K h -> (K h) D",
    "decoder/layers/attention/v": "D K h -> (K h) D",
    "decoder/layers/attention/o": "H h D -> D (H h)",
    "decoder/layers/mlp_norm": "D -> D",
    "decoder/layers/mlp/gate": "D F -> F D",
    "decoder/layers/mlp/up": "D F -> F D",
    "decoder/layers/mlp/down": "F D -> D F",
    "decoder/norm": "D -> D",
    "decoder/head": "D V -> V D",
    "vision/patch_embed": "(c p q) W -> W c p q",
    "vision/norm": "W -> W",
    "vision/layers/attention_norm": "W -> W",
    "vision/layers/attention/q": "W N n -> (N n) W",
    "vision/layers/attention/k": "W N n -> (N n) W",
    "vision/layers/attention/v": "W N n -> (N n) W",
    "vision/layers/attention/o": "N n W -> W (N n)",
    "vision/layers/mlp_norm": "W -> W",
    "vision/layers/mlp/gate": "W M -> M W",
    "vision/layers/mlp/up": "W M -> M W",
    "vision/layers/mlp/down": "M W -> W M",
    "projector/norm": "W -> W",
    "projector/merge": "A W -> W A",
    "projector/linear_1": "W P -> P W",
    "projector/linear_2": "P D -> D P",
}
"""How axes move where RoPE pairs the features (i, i + h/2) of a head, as ours does."""
NEIGHBOURS = HALVES | {
    "decoder/layers/attention/q": "D H (r s) -> (H s r) D",
    "decoder/layers/attention/k": "D K (r s) -> (K s r) D",
    "vision/layers/attention/q": "W N (r t) -> (N t r) W",
    "vision/layers/attention/k": "W N (r t) -> (N t r) W",
}
"""Where it pairs (2i, 2i + 1): a head's rows of q and k stand in another order."""


def table_of(names: Mapping[str, str], axes: Mapping[str, str]) -> Table:
    """Of a format's names of tensors."""
    return {path: (name, axes[path]) for path, name in names.items()}


def _sizes(spec: ModelSpec) -> dict[str, int]:
    """The letters of a table: D width, H heads, K kv heads, h head width, F mlp width, V vocab; of the vision tower, W
    width, N heads, n head width, M mlp width, c p q a patch; the projector merges A values into W and has width P. A
    head's width in two halves, which RoPE pairs, is r s, in the tower r t."""
    sizes = dict(
        D=spec.width, H=spec.heads, K=spec.kv_heads, h=spec.head_width, F=spec.mlp_width, V=spec.vocab, P=spec.width
    )
    sizes |= dict(r=2, s=spec.head_width // 2)
    if (v := spec.vision) is not None:
        sizes |= dict(W=v.width, N=v.heads, n=v.head_width, M=v.mlp_width, A=v.merge**2 * v.width)
        sizes |= dict(c=3, p=v.patch_size, q=v.patch_size, t=v.head_width // 2)
    return sizes


@dataclass(frozen=True)
class Slot:
    """Where one tensor of a file lies in our parameters."""

    path: str
    layer: int | None
    name: str
    pattern: str
    sizes: dict[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""
        axes = re.findall(r"\(.*?\)|\w", self.pattern.split(" -> ")[1])
        return tuple(math.prod(self.sizes[letter] for letter in re.findall(r"\w", axis)) for axis in axes)

    def _rearrange(self, x: np.ndarray, pattern: str) -> np.ndarray:
        return rearrange(x, pattern, **{k: n for k, n in self.sizes.items() if k in pattern})

    def leaf(self, params: Params) -> Any:
        """This tensor in our parameters."""
        leaf: Any = reduce(getitem, self.path.split("/"), params)
        return leaf if self.layer is None else leaf[self.layer]

    def turned(self, value: np.ndarray) -> np.ndarray:
        """A tensor of ours with its axes as in the file."""
        return self._rearrange(value, self.pattern)

    def take(self, params: Params) -> np.ndarray:
        """This tensor as the file has it, fetched to the host."""
        return self.turned(fetch(self.leaf(params)))

    def view(self, value: np.ndarray) -> np.ndarray:
        """A tensor from the file with its axes as ours. Of a mapped file nothing is read yet, but where features of a
        head are paired in another way: that is a copy."""
        ours, theirs = self.pattern.split(" -> ")
        return self._rearrange(value, f"{theirs} -> {ours}")


def table_slots(spec: ModelSpec, table: Table) -> list[Slot]:
    """Every tensor of a model that `table` names, layer by layer."""
    sizes, found = _sizes(spec), []
    for path, (name, pattern) in table.items():
        part = path.split("/")[0]
        if (part != "decoder" and spec.vision is None) or (path == "decoder/head" and spec.tied):
            continue
        depth = spec.layers if part == "decoder" or spec.vision is None else spec.vision.layers
        layers = range(depth) if "/layers/" in path else [None]
        found += [Slot(path, i, name.format(i), pattern, sizes) for i in layers]
    return sorted(found, key=lambda slot: -1 if slot.layer is None else slot.layer)


_MANY = 1000
"""Layers of which slots may be made whatever the files hold."""


def check_depth(spec: ModelSpec, tensors: int, directory: Path) -> None:
    """Before slots are made of as many layers as a configuration says, if those are many. Raises `UserError`: the files
    of `directory` have fewer `tensors`."""
    depth = max(spec.layers, spec.vision.layers if spec.vision is not None else 0)
    if depth > max(tensors, _MANY):
        raise UserError(f"{directory}: its configuration says {depth} layers, its files have only {tensors} tensors")


@dataclass(frozen=True)
class Checkpoint:
    """A model that lies in a directory, none of whose weights is read yet."""

    directory: Path
    spec: ModelSpec
    slots: list[Slot]
    tensors: Mapping[str, Tensor | Scaled]
    """By the slots' names."""
