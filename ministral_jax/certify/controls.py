"""Changed copies of an export that a comparison must tell from it: if it does not, its verdict says nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from ministral_jax.certify.gguf_file import drop_head, permute_back, set_key
from ministral_jax.files import write_json
from ministral_jax.interop import safetensors
from ministral_jax.models.spec import ModelSpec


@dataclass(frozen=True)
class Control:
    """A fault that some converter makes."""

    name: str
    applies: Callable[[ModelSpec], bool]
    plant: Callable[[Path, ModelSpec], None]
    """In a copy."""


def copied(directory: Path, to: Path) -> None:
    """A copy that shares the weights, on the same file system without a byte written: what is changed is replaced."""
    to.mkdir()
    for file in directory.iterdir():
        if file.suffix == ".safetensors" or file.name == "mmproj.gguf":
            try:
                os.link(file.resolve(), to / file.name)
                continue
            except OSError:  # another file system, or one without links
                pass
        if file.is_file():
            shutil.copy(file, to / file.name)


def change_tensor(directory: Path, name: str, change: Callable[[np.ndarray], np.ndarray] | None) -> None:
    """Write the file that holds a tensor again, with another value of it or, for None, without it. `name` may lack the
    prefixes that it has on disk."""
    tensors = {path: safetensors.read(path) for path in sorted(directory.glob("*.safetensors"))}
    # a tower's tensors may end in the same words, behind a longer prefix
    named = [(len(n), n, path) for path in tensors for n in tensors[path] if n == name or n.endswith(f".{name}")]
    _, found, path = min(named)
    pending = []
    for key, tensor in tensors[path].items():
        if key != found:
            pending.append(safetensors.Pending(key, tensor.dtype, tensor.shape, tensor.read))
        elif change is not None:
            value = change(np.array(tensor.read()))
            pending.append(safetensors.Pending(key, tensor.dtype, value.shape, lambda value=value: value))
    safetensors.write(draft := path.with_suffix(".draft"), pending, safetensors.metadata(path))
    draft.replace(path)
    for index in directory.glob("*.index.json") if change is None else ():
        content = json.loads(index.read_bytes())
        content["weight_map"].pop(found, None)
        write_json(index, content)


def _edit(directory: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((directory / name).read_bytes())
    change(content)
    write_json(directory / name, content)


def _hf_rope(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, ModelSpec], None]:
    def edit(config: dict[str, Any]) -> None:
        text = config.get("text_config", config)
        change(text.get("rope_parameters") or text["rope_scaling"])

    return lambda directory, spec: _edit(directory, "config.json", edit)


def _hf_unpermuted(directory: Path, spec: ModelSpec) -> None:
    """A head's rows of the first layer in the order of Mistral's own format."""
    for name in ("q", "k"):
        turned = lambda x: rearrange(x, "(n r s) d -> (n s r) d", r=2, s=spec.head_width // 2)
        change_tensor(directory, f"layers.0.self_attn.{name}_proj.weight", turned)


def _hf_headless(directory: Path, spec: ModelSpec) -> None:
    def tie(config: dict[str, Any]) -> None:
        for part in (config, config.get("text_config", config)):
            part["tie_word_embeddings"] = True

    change_tensor(directory, "lm_head.weight", None)
    _edit(directory, "config.json", tie)


def _has_temperature(spec: ModelSpec) -> bool:
    return spec.rope.temperature_beta > 0 and spec.rope.original_context is not None


Plant = Callable[[Path, ModelSpec], None]


def _controls(no_temperature: Plant, yarn_doubled: Plant, not_permuted: Plant, headless: Plant) -> tuple[Control, ...]:
    """The same faults of every format."""
    return (
        Control("temperature key removed", _has_temperature, no_temperature),
        Control("YaRN factor doubled", lambda spec: spec.rope.yarn_factor > 1, yarn_doubled),
        Control("q and k not permuted", lambda spec: True, not_permuted),
        Control("untied head dropped", lambda spec: not spec.tied, headless),
    )


def _native(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, ModelSpec], None]:
    return lambda directory, spec: _edit(directory, "params.json", change)


def _native_permuted(directory: Path, spec: ModelSpec) -> None:
    """A head's rows of the first layer in the order of transformers."""
    for name in ("wq", "wk"):
        turned = lambda x: rearrange(x, "(n s r) d -> (n r s) d", r=2, s=spec.head_width // 2)
        change_tensor(directory, f"layers.0.attention.{name}.weight", turned)


def _native_headless(directory: Path, spec: ModelSpec) -> None:
    change_tensor(directory, "output.weight", None)
    _edit(directory, "params.json", lambda params: params.update(tied_embeddings=True))


_OF_HF = _controls(
    _hf_rope(lambda rope: rope.pop("llama_4_scaling_beta")),
    _hf_rope(lambda rope: rope.update(factor=2 * rope["factor"])),
    _hf_unpermuted,
    _hf_headless,
)
_OF_NATIVE = _controls(
    _native(lambda params: params.pop("llama_4_scaling")),
    _native(lambda params: params["yarn"].update(factor=2 * params["yarn"]["factor"])),
    _native_permuted,
    _native_headless,
)
_OF_GGUF = _controls(
    set_key("attention.temperature_scale", lambda beta: 0.0),
    set_key("rope.scaling.factor", lambda factor: 2 * factor),
    permute_back,
    drop_head,
)
CONTROLS = {"gguf": _OF_GGUF, "hf": _OF_HF, "fp8": _OF_HF, "native": _OF_NATIVE}
"""By format."""
