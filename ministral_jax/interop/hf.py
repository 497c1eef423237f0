"""Checkpoints as Hugging Face directories, in both directions, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec

from ministral_jax.data.digests import Digests
from ministral_jax.distributed.collectives import fetch
from ministral_jax.errors import UserError
from ministral_jax.files import digest_of, open_plain, write_json
from ministral_jax.interop import safetensors
from ministral_jax.interop.export import Export, Format, export, write_shards
from ministral_jax.interop.hf_config import from_config, generation_config, load_config, processor_config, to_config
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import Params, abstract_params
from ministral_jax.places import place

# Our parameter -> Hugging Face tensor (under `language_model.model.` for the decoder) and how its axes move. {} is the
# layer. Letters are sizes, see `_sizes`.
TABLE = {
    "decoder/embed": ("embed_tokens.weight", "V D -> V D"),
    "decoder/layers/attention_norm": ("layers.{}.input_layernorm.weight", "D -> D"),
    "decoder/layers/attention/q": ("layers.{}.self_attn.q_proj.weight", "D H h -> (H h) D"),
    "decoder/layers/attention/k": ("layers.{}.self_attn.k_proj.weight", "D K h -> (K h) D"),
    "decoder/layers/attention/v": ("layers.{}.self_attn.v_proj.weight", "D K h -> (K h) D"),
    "decoder/layers/attention/o": ("layers.{}.self_attn.o_proj.weight", "H h D -> D (H h)"),
    "decoder/layers/mlp_norm": ("layers.{}.post_attention_layernorm.weight", "D -> D"),
    "decoder/layers/mlp/gate": ("layers.{}.mlp.gate_proj.weight", "D F -> F D"),
    "decoder/layers/mlp/up": ("layers.{}.mlp.up_proj.weight", "D F -> F D"),
    "decoder/layers/mlp/down": ("layers.{}.mlp.down_proj.weight", "F D -> D F"),
    "decoder/norm": ("norm.weight", "D -> D"),
    "decoder/head": ("lm_head.weight", "D V -> V D"),
    "vision/patch_embed": ("vision_tower.patch_conv.weight", "(c p q) W -> W c p q"),
    "vision/norm": ("vision_tower.ln_pre.weight", "W -> W"),
    "vision/layers/attention_norm": ("vision_tower.transformer.layers.{}.attention_norm.weight", "W -> W"),
    "vision/layers/attention/q": ("vision_tower.transformer.layers.{}.attention.q_proj.weight", "W N n -> (N n) W"),
    "vision/layers/attention/k": ("vision_tower.transformer.layers.{}.attention.k_proj.weight", "W N n -> (N n) W"),
    "vision/layers/attention/v": ("vision_tower.transformer.layers.{}.attention.v_proj.weight", "W N n -> (N n) W"),
    "vision/layers/attention/o": ("vision_tower.transformer.layers.{}.attention.o_proj.weight", "N n W -> W (N n)"),
    "vision/layers/mlp_norm": ("vision_tower.transformer.layers.{}.ffn_norm.weight", "W -> W"),
    "vision/layers/mlp/gate": ("vision_tower.transformer.layers.{}.feed_forward.gate_proj.weight", "W M -> M W"),
    "vision/layers/mlp/up": ("vision_tower.transformer.layers.{}.feed_forward.up_proj.weight", "W M -> M W"),
    "vision/layers/mlp/down": ("vision_tower.transformer.layers.{}.feed_forward.down_proj.weight", "M W -> W M"),
    "projector/norm": ("multi_modal_projector.norm.weight", "W -> W"),
    "projector/merge": ("multi_modal_projector.patch_merger.merging_layer.weight", "A W -> W A"),
    "projector/linear_1": ("multi_modal_projector.linear_1.weight", "W P -> P W"),
    "projector/linear_2": ("multi_modal_projector.linear_2.weight", "P D -> D P"),
}


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

    def take(self, params: Params) -> np.ndarray:
        """This tensor as the file has it, fetched to the host."""
        leaf: Any = reduce(getitem, self.path.split("/"), params)
        return self._rearrange(fetch(leaf if self.layer is None else leaf[self.layer]), self.pattern)

    def view(self, value: np.ndarray) -> np.ndarray:
        """A tensor from the file with its axes as ours; of a mapped file, nothing is read yet."""
        ours, theirs = self.pattern.split(" -> ")
        return self._rearrange(value, f"{theirs} -> {ours}")


def slots(spec: ModelSpec, table: Mapping[str, tuple[str, str]] = TABLE) -> list[Slot]:
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


# ---- export ---------------------------------------------------------------------------------------------------------


def export_hf(
    params: Params, spec: ModelSpec, directory: Path, dtype: str = "float32", tokenizer_files: Sequence[Path] = ()
) -> None:
    """Write a model that `transformers` loads, see `export`: configuration, sharded weights in `dtype` and copies of
    `tokenizer_files` (directories give their files)."""
    export(Export(params, spec, dtype, tokenizer_files), HF, directory)


def _write(model: Export, directory: Path) -> None:
    params, spec, dtype = model.params, model.spec, np.dtype(jnp.dtype(model.dtype))
    write_json(directory / "config.json", to_config(spec, model.dtype))
    write_json(directory / "generation_config.json", generation_config(spec))
    if spec.vision is not None:
        write_json(directory / "processor_config.json", processor_config(spec))
    write_shards(
        (safetensors.Pending(_disk_name(s.name, spec), dtype, s.shape, partial(s.take, params)) for s in slots(spec)),
        directory,
        "model",
    )


def fetch_slots(model: Export) -> None:
    """Take every tensor in the order of `slots`."""
    for slot in slots(model.spec):
        slot.take(model.params)


HF = Format(("float32", "bfloat16"), "config.json", partial(to_config, dtype="float32"), _write, fetch_slots)


def _disk_name(name: str, spec: ModelSpec) -> str:
    if name.startswith(("vision_tower.", "multi_modal_projector.")):
        return name
    outer = "" if spec.vision is None else "language_model."
    return f"{outer}{name}" if name.startswith("lm_head.") else f"{outer}model.{name}"


# ---- import ---------------------------------------------------------------------------------------------------------


def read_spec(directory: Path) -> ModelSpec:
    """Sizes of a Hugging Face model directory; no weights are read. Raises `UserError`: no such model, another
    architecture, or damaged files."""
    directory = place(directory, "directory")
    config, where = load_config(directory), str(directory / "config.json")
    from_config(config, where, True)  # another architecture is refused, whatever its weights are
    return from_config(config, where, "lm_head.weight" in _tensors(directory))


def checkpoint_digest(directory: Path, root: Path) -> str:
    """SHA-256 of what the files that are imported hold; what is known of them is kept in `root`, see `Digests`."""
    files, digests = [directory / "config.json", *sorted(directory.glob("*.safetensors"))], Digests(root)
    return digest_of([(path.name, digests.of_file(path)) for path in files])


def import_hf(directory: Path, dtype: Any = "float32", shardings: Params | None = None) -> tuple[ModelSpec, Params]:
    """Sizes and parameters of `dtype` of a Hugging Face directory: Mistral3ForConditionalGeneration, or the text-only
    Ministral3ForCausalLM and MistralForCausalLM. They are numpy arrays, or arrays placed by `shardings`, of which
    every host then reads only what its devices hold.

    Raises:
        UserError: as `read_spec`; also tensors that are missing, unexpected, or of another shape.
    """
    directory = place(directory, "directory")
    spec, tensors = read_spec(directory), _tensors(directory)
    wanted = {slot.name: slot for slot in slots(spec)}
    _require(directory, "lacks", wanted.keys() - tensors.keys())
    _require(directory, "has unexpected", tensors.keys() - wanted.keys())
    for name, slot in wanted.items():
        if tensors[name].shape != slot.shape:
            raise UserError(f"{directory}: {name} has shape {tensors[name].shape}, its config.json says {slot.shape}")
        if tensors[name].dtype.name not in _FLOATS:
            raise UserError(f"{directory}: {name} is {tensors[name].dtype.name}; {', '.join(_FLOATS)} can be read")

    stacks: dict[str, list[tuple[Slot, safetensors.Tensor]]] = {}
    for name, slot in wanted.items():  # layers ascending
        stacks.setdefault(slot.path, []).append((slot, tensors[name]))

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

    trees = (abstract_params(spec),) if shardings is None else (abstract_params(spec), shardings)
    return spec, jax.tree_util.tree_map_with_path(read, *trees)


def _read(slot: Slot, tensor: safetensors.Tensor, dtype: Any, index: Any = ...) -> np.ndarray:
    return safetensors.packed(slot.view(tensor.read())[index], dtype)


def _placed(
    parts: list[tuple[Slot, safetensors.Tensor]], shape: tuple[int, ...], dtype: Any, sharding: NamedSharding
) -> jax.Array:
    """A leaf where `sharding` says. Of layers one at a time is on the host, and goes into the stack in place."""

    def placed(part: tuple[Slot, safetensors.Tensor], shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(shape, sharding, lambda index: _read(*part, dtype, index))

    if parts[0][0].layer is None:
        return placed(parts[0], shape, sharding)
    alone = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stack = jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)()
    put = jax.jit(partial(jax.lax.dynamic_update_index_in_dim, axis=0), donate_argnums=0, out_shardings=sharding)
    for n, part in enumerate(parts):
        stack = put(stack, placed(part, shape[1:], alone), n).block_until_ready()  # before the next one is read
    return stack


_BUFFER = re.compile(r"(rotary_emb|patch_positional_embedding)\.((original_)?inv_freq|(cos|sin)_cached)$")
_FLOATS = ("float32", "bfloat16", "float16", "float64")


def _require(directory: Path, verb: str, names: set[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{directory} {verb} tensor {min(names)}{more}")


def _tensors(directory: Path) -> dict[str, safetensors.Tensor]:
    """Tensors of a directory under the names of `TABLE`. The prefixes `language_model.model.`, `model.language_model.`
    and `model.` are all in use. Mistral's own format (`consolidated*`) often lies in the same directory."""
    index, whole = directory / "model.safetensors.index.json", "model.safetensors"
    if index.is_file():
        with open_plain(index) as file:
            content = file.read()
        try:
            files = sorted(set(json.loads(content)["weight_map"].values()))
            if not all(isinstance(file, str) for file in files):
                raise TypeError(f"{files[0]} is no name of a file")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not a valid index: {error!r}") from None
        if whole not in files and (directory / whole).is_file():
            raise UserError(f"{directory} has two sets of weights, {whole} and those of {index.name}; delete one")
    else:
        files = sorted(f.name for f in directory.glob("*.safetensors") if not f.name.startswith("consolidated"))
    if not files:
        raise UserError(f"{directory} has no model.safetensors")
    found: dict[str, safetensors.Tensor] = {}
    for file in files:
        if not (directory / file).is_file():
            raise UserError(f"{index} names {file}, which is not there")
        for name, tensor in safetensors.read(directory / file).items():
            short = re.sub(r"^(language_model\.|model\.)+", "", name)
            if _BUFFER.search(short):  # older releases kept what the configuration says
                continue
            if short in found:
                raise UserError(f"{directory}: {name} stands twice, in {found[short].path.name} and {file}")
            found[short] = tensor
    return found
