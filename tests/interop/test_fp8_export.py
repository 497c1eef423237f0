"""FP8 exports: the layout of the released models, values that are rounded once, and scales that cover what they saw."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from model_cases import CASES, by_hf_name, inputs, pack, random_params

from ministral_jax.errors import UserError
from ministral_jax.interop import safetensors
from ministral_jax.interop.checkpoint import import_checkpoint
from ministral_jax.interop.export import Export, export
from ministral_jax.interop.fp8_export import FP8, calibrate
from ministral_jax.models.block import Exported
from ministral_jax.models.vlm import VLM

CASE, TEXT = CASES["images"], CASES["text"]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Parameters, the export's files and its configuration."""
    params, path = random_params(CASE.spec), tmp_path_factory.mktemp("export") / "fp8"
    scale = np.exp2(np.arange(CASE.spec.layers) - 3)
    layers = {"attention": {"input": scale, "mixed": scale * 2}, "mlp": {"input": scale * 4, "hidden": scale * 8}}
    export(Export(params, CASE.spec, "bfloat16", scales={"decoder": {"layers": layers}}), FP8, path)
    tensors = {name: t.read() for name, t in safetensors.read(path / "model.safetensors").items()}
    return params, tensors, json.loads((path / "config.json").read_text())


def test_the_layout_is_that_of_the_released_models(made):
    """Names, dtypes and shapes as in Ministral 3 Instruct: one number a tensor, and none for what is left as it is."""
    params, tensors, config = made
    assert config["quantization_config"] == {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": None,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        "dequantize": False,
    }
    rounded = {name for name, tensor in tensors.items() if tensor.dtype == ml_dtypes.float8_e4m3fn}
    layers = [f"language_model.model.layers.{i}" for i in range(CASE.spec.layers)]
    parts = [f"{'mlp' if 'gate up down'.count(kind[:2]) else 'self_attn'}.{kind}" for kind in LINEAR]
    assert rounded == {f"{layer}.{part}.weight" for layer in layers for part in parts}
    scales = {f"{name}_scale_inv" for name in rounded}
    scales |= {f"{name.removesuffix('weight')}activation_scale" for name in rounded}
    assert scales == {name for name, tensor in tensors.items() if tensor.shape == ()}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in rounded} == {np.dtype(ml_dtypes.bfloat16)}
    assert len(tensors) == len(by_hf_name(params, CASE.spec)) + 2 * len(rounded)


def test_a_matrix_is_rounded_once_by_a_power_of_two_that_fits_it(made):
    params, tensors, _ = made
    for name, whole in by_hf_name(params, CASE.spec).items():
        if not any(kind in name for kind in LINEAR) or "vision" in name:
            continue
        scale = float(tensors[f"language_model.model.{name}_scale_inv"].astype(np.float32))
        assert np.log2(scale) % 1 == 0 and 224 < np.abs(whole).max() / scale <= 448
        stored = tensors[f"language_model.model.{name}"]
        np.testing.assert_array_equal(stored, (whole / scale).astype(ml_dtypes.float8_e4m3fn))


def test_a_layer_has_the_scale_of_what_goes_into_it(made):
    _, tensors, _ = made
    told = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 2, "gate_proj": 4, "up_proj": 4, "down_proj": 8}
    for name, tensor in tensors.items():
        if name.endswith("activation_scale"):
            *_, layer, _, kind, _ = name.split(".")
            assert tensor == told[kind] * 2.0 ** (int(layer) - 3)


@pytest.fixture(scope="module")
def calibrated():
    """Parameters, a batch that ends in padding, and the scales that it gives."""
    params, batch = random_params(TEXT.spec), pack(TEXT)
    return params, batch, calibrate(VLM(TEXT.spec), params, [batch])


@pytest.fixture(scope="module")
def logits(calibrated):
    """Of what stands for an export, at the tokens of the batch."""
    _, batch, _ = calibrated
    run = jax.jit(lambda variables: VLM(TEXT.spec, Exported()).apply(variables, **inputs(batch)))
    return lambda **variables: np.asarray(run(variables))[batch["segments"] > 0]


def test_scales_cover_what_tokens_send_in(calibrated, logits):
    params, _, scales = calibrated
    own = logits(params=params)
    np.testing.assert_array_equal(logits(params=params, scales=scales), own)
    for part, name in (("attention", "input"), ("attention", "mixed"), ("mlp", "input"), ("mlp", "hidden")):
        small = jax.tree.map(np.copy, scales)
        small["decoder"]["layers"][part][name] /= 16  # numbers are cut off
        changed = logits(params=params, scales=small)
        assert np.abs(changed - own).max() > 0.1 * np.abs(own).max(), (part, name)


def test_what_is_read_back_is_the_model_that_was_rounded(calibrated, logits, tmp_path):
    params, _, scales = calibrated
    export(Export(params, TEXT.spec, "float32", scales=scales), FP8, tmp_path / "fp8")
    spec, read = import_checkpoint(tmp_path / "fp8")
    assert spec == TEXT.spec
    np.testing.assert_array_equal(logits(params=read), logits(params=params))
    assert not np.array_equal(read["decoder"]["layers"]["mlp"]["up"], params["decoder"]["layers"]["mlp"]["up"])


def test_padding_does_not_count(calibrated):
    params, batch, _ = calibrated
    params = jax.tree.map(np.copy, params)
    params["decoder"]["layers"]["attention_norm"][0, 3] = 1000  # what is at padding alone
    params["decoder"]["embed"][:, 3] = 0
    quiet = calibrate(VLM(TEXT.spec), params, [batch])
    assert not (batch["tokens"][batch["segments"] > 0] == 0).any()
    params["decoder"]["embed"][0, 3] = 1
    heard = calibrate(VLM(TEXT.spec), params, [batch])
    assert jax.tree.all(jax.tree.map(np.array_equal, heard, quiet))


def test_batches_without_a_token_and_parameters_that_give_nan_are_refused(calibrated):
    params, batch, _ = calibrated
    with pytest.raises(UserError, match="saw no token"):
        calibrate(VLM(TEXT.spec), params, [{**batch, "segments": np.zeros_like(batch["segments"])}])
    bad = jax.tree.map(np.copy, params)
    bad["decoder"]["embed"][:] = np.nan
    with pytest.raises(UserError, match="activations that are not finite"):
        calibrate(VLM(TEXT.spec), bad, [batch])
