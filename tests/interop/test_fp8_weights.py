"""Checkpoints of FP8: what their numbers stand for, and what is wrong with their scales."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from interop_cases import SPEC, rename, to_fp8
from model_cases import by_hf_name

from ministral_jax.errors import UserError
from ministral_jax.interop import safetensors
from ministral_jax.interop.checkpoint import import_checkpoint, open_checkpoint, read_spec
from ministral_jax.interop.fp8_weights import Scaled

GATE = "language_model.model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("block", "scheme", "shape"),
    [(None, "static", ()), (None, "dynamic", (1,)), ((8, 8), "dynamic", None), ((3, 128), "static", None)],
    ids=["scalar, static", "scalar, dynamic", "blocks that end within", "blocks wider than the tensor"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_what_their_codes_and_scales_stand_for_and_others_stay(
    exported, params, block, scheme, shape, dtype, monkeypatch
):
    monkeypatch.setattr(safetensors, "_BLOCK", 64)  # a few rows of a tensor
    means = to_fp8(exported, block, scheme, shape)
    assert read_spec(exported) == SPEC and len(means) == 7 * SPEC.layers
    spec, found = import_checkpoint(exported, dtype)
    plain = by_hf_name(params, spec)
    for name, value in by_hf_name(found, spec).items():
        assert np.array_equal(value, means.get(name, plain[name]).astype(dtype)), name


def test_a_device_reads_its_part_of_a_tensor_of_blocks(exported):
    means = to_fp8(exported, (8, 8))
    found = open_checkpoint(exported)
    scaled = [(slot, t) for slot in found.slots if isinstance(t := found.tensors[slot.name], Scaled)]
    assert len(scaled) == len(means)
    for slot, tensor in scaled:
        whole = slot.view(means[slot.name])
        for part in (slice(0, 3), slice(3, 13), slice(13, None)):
            index = (part, *[slice(1, None)] * (whole.ndim - 1))
            assert np.array_equal(tensor.read(slot.view, index, np.dtype(np.float32)), whole[index]), slot.name


def quantisation(**changes):
    return lambda config: config["quantization_config"].update(changes)


@pytest.mark.parametrize(
    ("change", "tensors", "sentence"),
    [
        (quantisation(), {f"{GATE}_scale_inv": None}, "layers.0.mlp.gate_proj.weight is FP8 and lacks its scale"),
        (
            quantisation(),
            {f"{GATE}_scale_inv": np.ones(2, np.float32)},
            r"gate_proj.weight \(28, 20\) has shape \(2,\), expected one number",
        ),
        (
            quantisation(weight_block_size=[8, 8]),
            {f"{GATE}_scale_inv": np.ones((3, 4), np.float32)},
            r"has shape \(3, 4\), expected \(4, 3\) for blocks of \(8, 8\)",
        ),
        (quantisation(), {f"{GATE}_scale_inv": np.ones((), np.int32)}, "scale of .* is int32; float32, bfloat16"),
        (quantisation(), {f"{GATE}_scale_inv": np.full((), np.nan, np.float32)}, "not all numbers above 0"),
        (quantisation(), {GATE: np.ones((28, 20), ml_dtypes.bfloat16)}, "is a scale, but .*weight is bfloat16"),
        (quantisation(weight_block_size=8), {}, "weight_block_size is 8, expected null or rows and columns"),
        (quantisation(activation_scheme="some"), {}, "activation_scheme is 'some', expected static or dynamic"),
        (
            quantisation(quant_method="compressed-tensors"),
            {},
            r"weights are quantised \(compressed-tensors\); those of",
        ),
        (lambda config: config.pop("quantization_config"), {}, "has unexpected tensor .*activation_scale"),
    ],
)
def test_scales_that_cannot_be_right_are_refused(exported, change, tensors, sentence):
    to_fp8(exported)
    rename(
        exported, lambda name: None if name in tensors else name, **{k: v for k, v in tensors.items() if v is not None}
    )
    config = json.loads((exported / "config.json").read_text())
    change(config)
    (exported / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=sentence):
        import_checkpoint(exported)
