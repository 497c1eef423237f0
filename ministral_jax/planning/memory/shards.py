"""What one device holds of a model: the shapes of its parameters, which axes they have, and how a mesh cuts them.

Nothing is traced, which for a real size takes half a second; a test holds these shapes against the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from jax.sharding import Mesh

from ministral_jax.distributed.placement import Rules, partition
from ministral_jax.models import decoder, vision
from ministral_jax.models.spec import ModelSpec

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
Axes = tuple[str | None, ...]
Parameter = tuple[tuple[int, ...], Axes]
"""Shape and logical axes."""


def parameters(spec: ModelSpec) -> Mapping[str, Parameter]:
    """By path, as `models.vlm.abstract_params` and `logical_axes` have them."""
    return _parameters(spec)


def _list(spec: ModelSpec) -> Mapping[str, Parameter]:
    D, V = spec.width, spec.vocab
    sizes = (D, spec.heads, spec.kv_heads, spec.head_width, spec.mlp_width)
    found: dict[str, Parameter] = {
        "decoder/embed": ((V, D), ("vocab", "embed")),
        "decoder/norm": ((D,), ("embed",)),
        **_block("decoder/layers", spec.layers, "layers", sizes, decoder.AXES),
    }
    if not spec.tied:
        found["decoder/head"] = ((D, V), ("embed", "vocab"))
    if (v := spec.vision) is not None:
        W, merged = v.width, v.merge**2 * v.width
        sizes = (W, v.heads, v.heads, v.head_width, v.mlp_width)
        found |= {
            "vision/patch_embed": ((v.patch_width, W), ("patch", "vision_embed")),
            "vision/norm": ((W,), ("vision_embed",)),
            **_block("vision/layers", v.layers, "vision_layers", sizes, vision.AXES),
            "projector/norm": ((W,), ("vision_embed",)),
            "projector/merge": ((merged, W), ("merged_patches", "vision_embed")),
            "projector/linear_1": ((W, D), ("vision_embed", "projector")),
            "projector/linear_2": ((D, D), ("projector", "embed")),
        }
    return MappingProxyType(found)


def _block(
    where: str, depth: int, stack: str, sizes: tuple[int, int, int, int, int], axes: tuple[str, ...]
) -> dict[str, Parameter]:
    D, H, K, h, F = zip(sizes, axes, strict=True)
    matrices = {
        "attention_norm": (D,),
        "attention/q": (D, H, h),
        "attention/k": (D, K, h),
        "attention/v": (D, K, h),
        "attention/o": (H, h, D),
        "mlp_norm": (D,),
        "mlp/gate": (D, F),
        "mlp/up": (D, F),
        "mlp/down": (F, D),
    }
    named = {f"{where}/{name}": tuple(zip(*dims, strict=True)) for name, dims in matrices.items()}
    return {name: ((depth, *shape), (stack, *names)) for name, (shape, names) in named.items()}


def local_shape(shape: tuple[int, ...], axes: Axes, rules: Rules, mesh: Mesh) -> tuple[int, ...]:
    """Of an array, what one device holds."""
    return _local_shape(shape, axes, rules, mesh)


def _shape(shape: tuple[int, ...], axes: Axes, rules: Rules, mesh: Mesh) -> tuple[int, ...]:
    entries = partition(shape, axes, rules, mesh)
    names = [(entry,) if isinstance(entry, str) else entry or () for entry in entries]
    return tuple(size // math.prod(mesh.shape[a] for a in cut) for size, cut in zip(shape, names, strict=True))


# Any: a type checker takes frozen models for unhashable.
_local_shape: Any = lru_cache(maxsize=4096)(_shape)
_parameters: Any = lru_cache(maxsize=64)(_list)


@dataclass(frozen=True)
class Shards:
    """A model of `spec` on a mesh, by these rules."""

    spec: ModelSpec
    rules: Rules
    mesh: Mesh

    def size(self, *parts: str, without: tuple[str, ...] = ()) -> int:
        """Parameters that one device holds: of all, or of paths that begin so; without paths that begin so."""
        return sum(
            math.prod(local_shape(shape, axes, self.rules, self.mesh))
            for path, (shape, axes) in parameters(self.spec).items()
            if path.startswith(parts or ("",)) and not path.startswith(without or ("-",))
        )

    def cut(self, size: int, axis: str) -> int:
        """What is left of a dimension that lies on this logical axis alone."""
        return local_shape((size,), (axis,), self.rules, self.mesh)[0]

    @property
    def vocab(self) -> int:
        return self.cut(self.spec.vocab, "vocab")
