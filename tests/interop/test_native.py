"""Mistral's own format: what is written, read and refused."""

from __future__ import annotations

import json

import native_reader
import pytest
from interop_cases import write
from model_cases import CASES, TEXT, YARN, random_params, relative, vlm
from paths import TESTS

from ministral_jax.errors import UserError
from ministral_jax.interop import safetensors
from ministral_jax.interop.checkpoint import import_checkpoint
from ministral_jax.interop.export import Export, export
from ministral_jax.interop.native import NATIVE
from ministral_jax.interop.native_config import from_params, to_params
from ministral_jax.models.spec import PRESETS, RopeSpec


@pytest.mark.parametrize("name", ["images", "text_tied_long"])
def test_a_reader_that_rotates_neighbours_has_the_logits_of_transformers(name, tmp_path):
    case, path = CASES[name], TESTS / "golden" / f"{name}.safetensors"
    golden = {key: tensor.read() for key, tensor in safetensors.read(path).items()}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(safetensors.metadata(path)["config"])
    weights = {key.removeprefix("weights/"): value for key, value in golden.items() if key.startswith("weights/")}
    write(tmp_path / "hf/model.safetensors", weights)
    spec, params = import_checkpoint(tmp_path / "hf")
    export(Export(params, spec, "float32"), NATIVE, tmp_path / "native")
    for i, document in enumerate(case.documents):
        assert relative(native_reader.logits(tmp_path / "native", document), golden[f"logits/{i}"]) < 2e-5


def test_sizes_come_back():
    released = [PRESETS[f"{name}"] for name in ("mistral-small-3.1-24b", "ministral-3-14b", "ministral-3-3b")]
    small = [TEXT, vlm(rope=YARN), vlm(rope=RopeSpec(theta=1e9, temperature_beta=0.1, original_context=16))]
    for spec in [*released, *small]:
        params = json.loads(json.dumps(to_params(spec)))
        assert from_params(params, "params.json", has_head=not spec.tied) == spec
        assert from_params(params, "params.json", has_head=True).tied is False


def test_a_released_file_is_read():
    """With the keys that the 3B has; of the context there is another spelling."""
    spec = PRESETS["ministral-3-3b"]
    released = dict(
        dim=3072, n_layers=26, head_dim=128, hidden_dim=9216, n_heads=32, n_kv_heads=8, rope_theta=1000000.0,
        norm_eps=1e-05, vocab_size=131072, tied_embeddings=True, max_seq_len=262144, q_lora_rank=None,
        yarn=dict(original_max_position_embeddings=16384, factor=16, apply_scale=False, beta=32, alpha=1),
        llama_4_scaling=dict(original_max_position_embeddings=16384, beta=0.1),
        vision_encoder=dict(
            image_token_id=10, image_break_token_id=12, image_end_token_id=13, intermediate_size=4096,
            num_hidden_layers=24, num_attention_heads=16, mm_projector_id="patch_merge", spatial_merge_size=2,
            hidden_size=1024, num_channels=3, image_size=1540, max_image_size=1540, patch_size=14, rope_theta=10000.0,
            add_pre_mm_projector_layer_norm=True, adapter_bias=False,
        ),
    )  # fmt: skip
    assert from_params(released, "params.json", has_head=False) == spec


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.pop("dim"), "params.json: dim is missing"),
        (lambda p: p.update(n_layers=0), "n_layers is 0, expected a whole number above 0"),
        (lambda p: p.update(n_kv_heads=3), "must be a multiple of kv_heads = 3"),
        (lambda p: p.pop("max_position_embeddings"), "max_position_embeddings is missing"),
        (lambda p: p.update(max_seq_len=7), "max_position_embeddings is 48 and max_seq_len is 7, which mean the same"),
        (lambda p: p.update(moe={"num_experts": 4}), "moe is given: a mixture of experts"),
        (lambda p: p.update(sliding_window=[None, 8]), "sliding_window is given: attention to a window"),
        (lambda p: p.update(norm_eps=1e-6), r"norm_eps is 1e-06, but readers of Mistral's format have 1e-05"),
        (lambda p: p.update(norm_eps="x"), "norm_eps: Input should be a valid number"),
        (lambda p: p.update(yarn=7), "yarn is 7, expected an object"),
        (lambda p: p["yarn"].pop("apply_scale"), "apply_scale is true, this model family has false"),
        (
            lambda p: p["yarn"].update(original_max_position_embeddings=9),
            "of yarn is 9 and .* of llama_4_scaling is 12",
        ),
        (lambda p: p["vision_encoder"].update(mm_projector_id="linear"), 'mm_projector_id is "linear"'),
        (lambda p: p["vision_encoder"].update(adapter_bias=True), "adapter_bias is true"),
        (lambda p: p["vision_encoder"].pop("patch_size"), "vision_encoder: patch_size is missing"),
    ],
)
def test_other_architectures_are_refused(change, message):
    params = json.loads(json.dumps(to_params(vlm(rope=YARN))))
    change(params)
    with pytest.raises(UserError, match=message):
        from_params(params, "params.json", has_head=True)


def test_epsilons_that_native_readers_do_not_have_are_refused(tmp_path):
    spec = vlm(norm_eps=1e-3)
    with pytest.raises(UserError, match=r"norm_eps is 0.001, but readers of Mistral's format have 1e-05"):
        export(Export(random_params(spec), spec, "float32"), NATIVE, tmp_path / "native")
    assert not any(tmp_path.iterdir())
