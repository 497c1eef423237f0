"""The weights of a small exported model, written again with changes."""

import json

import ml_dtypes
import numpy as np
from model_cases import CASES

from ministral_jax.interop import safetensors

SPEC = CASES["images"].spec


def write(path, tensors: dict) -> None:
    safetensors.write(path, [safetensors.Pending(k, v.dtype, v.shape, lambda v=v: v) for k, v in tensors.items()])


def rename(directory, change, **more: np.ndarray) -> None:
    """Write the weights of an export again under other names, and `more`; None leaves a tensor out."""
    path = directory / "model.safetensors"
    held = {change(name): np.array(t.read()) for name, t in safetensors.read(path).items() if change(name) is not None}
    write(path, held | more)


def to_fp8(directory, block=None, scheme="static", shape=()) -> dict[str, np.ndarray]:
    """Turn an export into what FP8 releases are: matrices of the decoder's layers as e4m3, each with a scale of `shape`
    or one of every block. Returns what each of them stands for, by its name without prefixes."""
    path, held, means = directory / "model.safetensors", {}, {}
    for name, tensor in safetensors.read(path).items():
        value = held[name] = np.array(tensor.read())
        if not name.startswith("language_model.model.layers.") or value.ndim == 1:
            continue
        size = block or value.shape
        grid = tuple(-(-n // step) for n, step in zip(value.shape, size, strict=True))
        scale = np.random.RandomState(len(held)).uniform(0.01, 0.03, grid).astype(np.float32)
        whole = np.repeat(np.repeat(scale, size[0], 0), size[1], 1)[: value.shape[0], : value.shape[1]]
        held[name] = (value / whole).astype(ml_dtypes.float8_e4m3fn)
        means[name.removeprefix("language_model.model.")] = held[name].astype(np.float32) * whole
        held[f"{name}_scale_inv"] = scale if block else scale.reshape(shape)
        if scheme == "static":
            held[name.removesuffix("weight") + "activation_scale"] = np.full((), 0.5, np.float32)
    write(path, held)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": scheme, "weight_block_size": block}
    (directory / "config.json").write_text(json.dumps(config))
    return means
