"""Checkpoints of any format, read into our parameters one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ministral_jax.console import say
from ministral_jax.data.digests import Digests
from ministral_jax.distributed.collectives import is_first
from ministral_jax.errors import UserError
from ministral_jax.files import digest_of
from ministral_jax.interop import safetensors
from ministral_jax.interop.fp8_weights import Scaled
from ministral_jax.interop.hf import open_hf
from ministral_jax.interop.native import open_native
from ministral_jax.interop.shards import NATIVE_STEM, weight_files
from ministral_jax.interop.slots import Checkpoint, Slot
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import Params, abstract_params
from ministral_jax.places import place

CONFIGS = ("config.json", "params.json")
"""Files of which a checkpoint has one, by which its format is known."""
_FLOATS = ("float32", "bfloat16", "float16", "float64")


def is_checkpoint(directory: Path) -> bool:
    """Whether a model of a format that can be read lies there."""
    return any((directory / name).is_file() for name in CONFIGS)


def open_checkpoint(directory: Path) -> Checkpoint:
    """The model in a directory, whose files say in which format it is; no weights are read.

    Raises:
        UserError: no such model, another architecture, or damaged files.
    """
    directory = place(directory, "directory")
    return open_native(directory) if _is_native(directory) else open_hf(directory)


def checked_checkpoint(directory: Path) -> Checkpoint:
    """`open_checkpoint`, of which every tensor is there and as it should be, and no other is. Raises `UserError`: as
    there; also tensors that are missing, unexpected, or of another shape."""
    found = open_checkpoint(directory)
    wanted = {slot.name: slot.shape for slot in found.slots}
    _require(found.directory, "lacks", wanted.keys() - found.tensors.keys())
    _require(found.directory, "has unexpected", found.tensors.keys() - wanted.keys())
    for name, shape in wanted.items():
        tensor = found.tensors[name]
        if tensor.shape != shape:
            raise UserError(f"{found.directory}: {name} has shape {tensor.shape}, its configuration says {shape}")
        if not isinstance(tensor, Scaled) and tensor.dtype.name not in _FLOATS:
            raise UserError(f"{found.directory}: {name} is {tensor.dtype.name}; {', '.join(_FLOATS)} can be read")
    return found


def _is_native(directory: Path) -> bool:
    """Whether a model is read in Mistral's own format: where that of `transformers` is not there as well."""
    if not (directory / "params.json").is_file():
        return False
    return not ((directory / "config.json").is_file() and weight_files(directory, "model"))


def read_spec(directory: Path) -> ModelSpec:
    """Sizes of the model in a directory. Raises `UserError` as `open_checkpoint`."""
    return open_checkpoint(directory).spec


def checkpoint_digest(directory: Path, root: Path) -> str:
    """SHA-256 of what the files that are imported hold; what is known of them is kept in `root`, see `Digests`."""
    config, stem = ("params.json", NATIVE_STEM) if _is_native(directory) else ("config.json", "model")
    files, digests = [directory / config, *weight_files(directory, stem)], Digests(root)
    return digest_of([(path.name, digests.of_file(path)) for path in files])


def import_checkpoint(
    directory: Path, dtype: Any = "float32", shardings: Params | None = None
) -> tuple[ModelSpec, Params]:
    """Sizes and parameters of `dtype` of the model in a directory. They are numpy arrays, or arrays placed by
    `shardings`, of which every host then reads only what its devices hold. Weights of FP8 become what they stand for.

    Raises:
        UserError: as `checked_checkpoint`.
    """
    found = checked_checkpoint(directory)
    if is_first() and all((found.directory / name).is_file() for name in CONFIGS):
        which = "Mistral's own" if _is_native(found.directory) else "that of transformers"
        say(f"{found.directory} describes its model in two formats; {which} is read")
    stacks: dict[str, list[tuple[Slot, safetensors.Tensor | Scaled]]] = {}
    for slot in found.slots:  # layers ascending
        stacks.setdefault(slot.path, []).append((slot, found.tensors[slot.name]))

    def read(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding | None = None) -> Any:
        parts = stacks["/".join(key.key for key in path)]
        if sharding is not None:
            return _placed(parts, leaf.shape, jnp.dtype(dtype), sharding)
        if parts[0][0].layer is None:
            return _read(*parts[0], jnp.dtype(dtype))
        out = np.empty(leaf.shape, jnp.dtype(dtype))
        for n, part in enumerate(parts):
            out[n] = _read(*part, out.dtype)
        return out

    trees = (abstract_params(found.spec),) if shardings is None else (abstract_params(found.spec), shardings)
    return found.spec, jax.tree_util.tree_map_with_path(read, *trees)


def _require(directory: Path, verb: str, names: Iterable[str]) -> None:
    if names := sorted(names):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{directory} {verb} tensor {names[0]}{more}")


def _read(slot: Slot, tensor: safetensors.Tensor | Scaled, dtype: np.dtype, index: Any = ...) -> np.ndarray:
    if isinstance(tensor, Scaled):
        return tensor.read(slot.view, index, dtype)
    return safetensors.packed(slot.view(tensor.read())[index], dtype)


def _placed(
    parts: list[tuple[Slot, safetensors.Tensor | Scaled]], shape: tuple[int, ...], dtype: Any, sharding: NamedSharding
) -> jax.Array:
    """A leaf where `sharding` says. Of layers one at a time is on the host, and goes into the stack in place."""

    def placed(
        part: tuple[Slot, safetensors.Tensor | Scaled], shape: tuple[int, ...], sharding: NamedSharding
    ) -> jax.Array:
        return jax.make_array_from_callback(shape, sharding, lambda index: _read(*part, dtype, index))

    if parts[0][0].layer is None:
        return placed(parts[0], shape, sharding)
    alone = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stack = jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)()
    put = jax.jit(partial(jax.lax.dynamic_update_index_in_dim, axis=0), donate_argnums=0, out_shardings=sharding)
    for n, part in enumerate(parts):
        stack = put(stack, placed(part, shape[1:], alone), n).block_until_ready()  # before the next one is read
    return stack
