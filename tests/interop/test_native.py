"""Mistral's own format: what is written, read and refused."""

from __future__ import annotations

import json

import jax
import ml_dtypes
import native_reader
import numpy as np
import pytest
from interop_cases import SPEC, write
from model_cases import CASES, TEXT, YARN, random_params, relative, vlm
from paths import TESTS

from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.errors import UserError
from ministral_jax.interop import export as shards_of
from ministral_jax.interop import safetensors
from ministral_jax.interop.checkpoint import import_checkpoint, read_spec
from ministral_jax.interop.export import Export, export
from ministral_jax.interop.hf import export_hf
from ministral_jax.interop.native import NATIVE, NATIVE_TABLE
from ministral_jax.interop.native_config import from_params, to_params
from ministral_jax.interop.slots import table_slots
from ministral_jax.models.spec import PRESETS, RopeSpec
from ministral_jax.models.vlm import param_shardings


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
    released = [PRESETS[f"{name}"] for name in ("mistral-small-3.1-24b", "mistral-medium-3.5-128b", "ministral-3-3b")]
    small = [TEXT, vlm(rope=YARN), vlm(rope=RopeSpec(theta=1e9, temperature_beta=0.1, original_context=16))]
    for spec in [*released, *small]:
        params = json.loads(json.dumps(to_params(spec)))
        assert from_params(params, "params.json", has_head=not spec.tied) == spec
        assert from_params(params, "params.json", has_head=True).tied is False


def test_the_magnitude_of_yarn_is_there_unless_it_is_switched_off():
    params = to_params(TEXT.model_copy(update={"rope": YARN}))
    assert params["yarn"]["apply_scale"] is False
    del params["yarn"]["apply_scale"]
    magnitude = from_params(params, "params.json", has_head=True).rope.attention_factor
    assert magnitude == pytest.approx(1 + 0.1 * np.log(4), rel=1e-12)
    with pytest.raises(UserError, match=r"rope.attention_factor is 1.25; Mistral's format has 1 and 0.1 ln"):
        to_params(TEXT.model_copy(update={"rope": YARN.model_copy(update={"attention_factor": 1.25})}))


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
        (lambda p: p["yarn"].update(apply_scale=1.5), "apply_scale is 1.5, this model family has true or false"),
        (lambda p: p["yarn"].pop("factor"), "yarn: factor is missing"),
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


# ---- there and back -------------------------------------------------------------------------------------------------


def bits(directory) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize(
    "spec, devices",
    [(TEXT, 0), (TEXT.model_copy(update={"tied": True, "rope": YARN}), 8), (vlm(rope=YARN), 8), (vlm(tied=True), 0)],
)
def test_a_model_comes_back_bit_for_bit_by_way_of_both_formats(tmp_path, spec, devices):
    place = Placement(make_mesh(MeshConfig(tensor=2)), Rules())
    shardings = param_shardings(spec, place) if devices else None
    source = random_params(spec)
    export_hf(source, spec, tmp_path / "hf")
    _, params = import_checkpoint(tmp_path / "hf", shardings=shardings)
    export(Export(params, spec, "float32"), NATIVE, tmp_path / "native")
    back, params = import_checkpoint(tmp_path / "native", shardings=shardings)
    assert back == spec == read_spec(tmp_path / "native")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, source))
    assert not devices or params["decoder"]["layers"]["attention"]["q"].sharding.spec[2] == "tensor"
    export_hf(params, spec, tmp_path / "again")
    assert bits(tmp_path / "again") == bits(tmp_path / "hf")


def test_shards_and_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_of, "SHARD_BYTES", 10_000)
    spec = vlm(rope=YARN)
    params = jax.tree.map(lambda p: p.astype(ml_dtypes.bfloat16), random_params(spec))
    tokenizer = tmp_path / "tekken.json"
    tokenizer.write_text("{}")
    export(Export(params, spec, "bfloat16", [tokenizer]), NATIVE, tmp_path / "native")
    index = json.loads((tmp_path / "native/consolidated.safetensors.index.json").read_text())
    files = {file.name for file in (tmp_path / "native").glob("consolidated-*.safetensors")}
    assert len(files) > 2 and files == set(index["weight_map"].values())
    assert (tmp_path / "native/tekken.json").is_file() and not (tmp_path / "native/config.json").exists()
    _, back = import_checkpoint(tmp_path / "native", "bfloat16")
    assert jax.tree.all(jax.tree.map(np.array_equal, back, params))


def test_of_both_formats_in_a_directory_that_of_transformers_is_read(exported, params, capsys):
    export(Export(jax.tree.map(lambda p: p + 1, params), SPEC, "float32"), NATIVE, exported.parent / "native")
    for file in (exported.parent / "native").iterdir():
        file.rename(exported / file.name)
    assert jax.tree.all(jax.tree.map(np.array_equal, import_checkpoint(exported)[1], params))
    assert "in two formats; that of transformers is read" in capsys.readouterr().err
    (exported / "model.safetensors").unlink()
    assert not jax.tree.all(jax.tree.map(np.array_equal, import_checkpoint(exported)[1], params))
    assert "in two formats; Mistral's own is read" in capsys.readouterr().err


def test_fp8_is_read_as_the_numbers_it_stands_for(tmp_path):
    spec, scale = TEXT, np.float32(0.37)
    params = random_params(spec)
    export(Export(params, spec, "float32"), NATIVE, tmp_path)
    path = tmp_path / "consolidated.safetensors"
    tensors = {name: np.array(tensor.read()) for name, tensor in safetensors.read(path).items()}
    expected = {}
    for name in [name for name in tensors if ".attention.w" in name or ".feed_forward." in name]:
        stem, eight = name.removesuffix(".weight"), (tensors[name] / scale).astype(ml_dtypes.float8_e4m3fn)
        expected[name] = eight.astype(np.float32) * scale
        tensors |= {name: eight, f"{stem}.qscale_weight": scale, f"{stem}.qscale_act": np.float32(1)}
    write(path, {name: np.asarray(value) for name, value in tensors.items()})
    with pytest.raises(UserError, match=r"float8_e4m3fn|has unexpected"):
        import_checkpoint(tmp_path)
    said = json.loads((tmp_path / "params.json").read_text())
    said["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    (tmp_path / "params.json").write_text(json.dumps(said))
    _, read = import_checkpoint(tmp_path)
    for slot in table_slots(spec, NATIVE_TABLE):
        assert np.array_equal(slot.take(read), expected.get(slot.name, tensors[slot.name])), slot.name
    said["quantization"]["qformat_weight"] = "int4"
    (tmp_path / "params.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=r'qformat_weight is "int4"'):
        import_checkpoint(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(to_params(TEXT)))
    with pytest.raises(UserError, match=r"has no consolidated.safetensors"):
        import_checkpoint(tmp_path)
    (tmp_path / "params.json").write_text("[")
    with pytest.raises(UserError, match=r"params.json: not valid JSON"):
        import_checkpoint(tmp_path)
