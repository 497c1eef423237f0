"""The weights of a small exported model, written again with changes."""

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
