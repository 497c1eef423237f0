"""Hugging Face directories: what is written, read and refused. Numbers are checked by `test_golden`."""

from __future__ import annotations

import json
import tracemalloc
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
from interop_cases import SPEC, rename, write
from model_cases import TEXT, YARN, random_params, vlm

from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.errors import UserError
from ministral_jax.interop import export, hf, safetensors
from ministral_jax.interop.checkpoint import import_checkpoint, read_spec
from ministral_jax.interop.hf import export_hf
from ministral_jax.models.spec import PRESETS, ModelSpec, RopeSpec
from ministral_jax.models.vlm import param_shardings


def same(a: dict, b: dict) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def edit(directory, change) -> None:
    """Apply `change` to the parsed config.json."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


# ---- the file format ------------------------------------------------------------------------------------------------


def test_safetensors_files_are_those_of_the_library(tmp_path):
    from safetensors.numpy import load_file, save_file

    random = np.random.default_rng(0)
    tensors = {
        "a": random.standard_normal((3, 4)).astype(np.float32),
        "b": random.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(3, np.int64),
    }
    write(tmp_path / "ours", tensors)
    theirs = load_file(tmp_path / "ours")
    assert same(theirs, tensors)
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert same({k: t.read() for k, t in safetensors.read(tmp_path / "theirs").items()}, tensors)
    assert safetensors.metadata(tmp_path / "theirs") == {"format": "pt"}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda b: b[:-5], "cut short"),
        (lambda b: b[:30], "cut short"),
        (lambda b: b"", "cut short"),
        (lambda b: b[:8] + b"#" + b[9:], "not a valid safetensors header"),
        (lambda b: b.replace(b'"F32"', b'"F31"'), "not a valid safetensors header"),
        (lambda b: b.replace(b"[3,4]", b"[3,5]"), "not a valid safetensors header"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    path = tmp_path / "model.safetensors"
    write(path, {"a": np.ones((3, 4), np.float32)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        safetensors.read(path)


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        TEXT,
        TEXT.model_copy(update={"tied": True, "rope": YARN}),
        vlm(rope=YARN),
        vlm(tied=True, norm_eps=1e-3, image_token=9),
        vlm(rope=RopeSpec(theta=1e9, temperature_beta=0.1, original_context=16)),
    ],
)
def test_a_model_comes_back_bit_for_bit(tmp_path, spec):
    params = random_params(spec)
    export_hf(params, spec, tmp_path / "hf")
    back, read = import_checkpoint(tmp_path / "hf")
    assert back == spec == read_spec(tmp_path / "hf")
    assert same(read, params)


def test_sizes_of_the_released_models_come_back(tmp_path):
    for name in ("mistral-small-3.1-24b", "ministral-3-14b", "ministral-3-8b", "ministral-3-3b"):
        spec = PRESETS[name]
        config = hf.to_config(spec, "bfloat16")
        assert config["text_config"]["model_type"] == ("mistral" if "24b" in name else "ministral3")
        assert config["tie_word_embeddings"] == config["text_config"]["tie_word_embeddings"] == ("3b" in name[-2:])
        assert hf.from_config(json.loads(json.dumps(config)), "config.json", has_head=not spec.tied) == spec


def test_names_on_disk_are_those_of_the_released_checkpoints(exported):
    names = set(safetensors.read(exported / "model.safetensors"))
    assert len(names) == 3 + 9 * SPEC.layers + 2 + 9 * SPEC.vision.layers + 4
    assert {
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.self_attn.q_proj.weight",
        "language_model.model.layers.0.post_attention_layernorm.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.patch_merger.merging_layer.weight",
        "vision_tower.patch_conv.weight",
        "vision_tower.transformer.layers.1.feed_forward.down_proj.weight",
    } < names


def test_export_in_shards_and_bfloat16(tmp_path, params, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 10_000)
    tokenizer, folder = tmp_path / "tekken.json", tmp_path / "more"
    tokenizer.write_text("{}")
    folder.mkdir()
    (folder / "chat_template.jinja").write_text("x")
    export_hf(jax.device_put(params), SPEC, tmp_path / "hf", "bfloat16", [tokenizer, folder])
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and {f.name for f in files} == set(index["weight_map"].values())
    assert all(f.stat().st_size < 10_000 + 4_000 for f in files)
    assert index["metadata"]["total_size"] == 2 * SPEC.parameters
    assert (tmp_path / "hf" / "tekken.json").is_file() and (tmp_path / "hf" / "chat_template.jinja").is_file()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda p: p.astype(ml_dtypes.bfloat16), params)
    assert same(import_checkpoint(tmp_path / "hf", "bfloat16")[1], rounded)
    assert same(import_checkpoint(tmp_path / "hf")[1], jax.tree.map(lambda p: p.astype(np.float32), rounded))


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    spec = ModelSpec(
        layers=8, width=128, mlp_width=512, heads=4, kv_heads=2, head_width=32, vocab=512, context=64, vision=None
    )
    params = random_params(spec)
    total, largest = 4 * spec.parameters, 4 * spec.width * spec.mlp_width
    assert total > 20 * largest

    def peak(work) -> int:
        tracemalloc.start()
        work()
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    monkeypatch.setattr(safetensors, "_ROWS", 2**12)  # of a copy in the file's order no more is there than this
    assert peak(lambda: export_hf(params, spec, tmp_path / "hf")) < largest
    assert peak(lambda: import_checkpoint(tmp_path / "hf")) < total + 3 * largest


def test_layers_are_placed_one_at_a_time(tmp_path, monkeypatch):
    """On a host that reads for its devices, not even one leaf of all layers is whole."""
    spec = vlm(vision=None, layers=6)
    params = random_params(spec)
    export_hf(params, spec, tmp_path / "hf")
    packed, alive, most = safetensors.packed, set[int](), 0

    def counted(*arguments):
        nonlocal most
        value = packed(*arguments)
        if value.shape == (spec.width, spec.mlp_width // 2):
            alive.add(id(value))
            weakref.finalize(value, alive.discard, id(value))
            most = max(most, len(alive))
        return value

    monkeypatch.setattr(safetensors, "packed", counted)
    place = Placement(make_mesh(MeshConfig(tensor=2, fsdp=1), jax.devices()[:2]), Rules())
    _, placed = import_checkpoint(tmp_path / "hf", shardings=param_shardings(spec, place))
    assert jax.tree.all(jax.tree.map(np.array_equal, placed, params))
    assert placed["decoder"]["layers"]["mlp"]["gate"].sharding.spec[2] == "tensor"
    assert 2 <= most <= 4  # two devices have a half each, of one layer and perhaps of the last one


# ---- what is in use elsewhere ---------------------------------------------------------------------------------------


def test_names_that_transformers_has_in_memory_are_read(exported, params):
    def in_memory(name):
        return (
            "lm_head.weight" if "lm_head" in name else "model." + name.replace("language_model.model", "language_model")
        )

    rename(exported, in_memory)
    assert "model.language_model.norm.weight" in safetensors.read(exported / "model.safetensors")
    assert same(import_checkpoint(exported)[1], params)


def test_weights_in_mistrals_own_format_beside_them_are_left_alone(exported, params):
    (exported / "consolidated.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    assert same(import_checkpoint(exported)[1], params)


@pytest.mark.parametrize("form", ["default", "bare", "axial"])
def test_older_ways_to_write_the_vision_rope_are_read(exported, form):
    def change(config):
        vision = config["vision_config"]
        theta = vision.pop("rope_parameters")["rope_theta"]
        vision |= (
            {"rope_theta": theta} if form == "bare" else {"rope_parameters": {"rope_type": form, "rope_theta": theta}}
        )

    edit(exported, change)
    assert read_spec(exported) == SPEC


def test_older_ways_to_write_the_text_rope_are_read(tmp_path):
    export_hf(random_params(TEXT), TEXT, tmp_path / "hf")
    edit(tmp_path / "hf", lambda c: c.update(rope_theta=c.pop("rope_parameters")["rope_theta"]))
    assert read_spec(tmp_path / "hf") == TEXT


@pytest.mark.parametrize("top", [True, False, None])
@pytest.mark.parametrize("text", [True, False, None])
def test_a_head_in_the_file_wins_then_the_text_config_then_the_top_level(tmp_path, top, text):
    def change(config):
        for section, value in ((config, top), (config["text_config"], text)):
            section.pop("tie_word_embeddings")
            section |= {} if value is None else {"tie_word_embeddings": value}

    export_hf(random_params(SPEC), SPEC, tmp_path / "untied")
    edit(tmp_path / "untied", change)
    assert not import_checkpoint(tmp_path / "untied")[0].tied
    rename(tmp_path / "untied", lambda name: None if "lm_head" in name else name)
    if text if text is not None else top:
        spec, params = import_checkpoint(tmp_path / "untied")
        assert spec.tied and "head" not in params["decoder"]
    else:
        with pytest.raises(UserError, match=r"lacks tensor lm_head.weight"):
            import_checkpoint(tmp_path / "untied")


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(model_type="llama"), "model_type is 'llama'; mistral3, ministral3 and mistral can be read"),
        (lambda c: c["text_config"].update(model_type="qwen3"), "text_config: model_type is 'qwen3'"),
        (
            lambda c: c.update(quantization_config={"quant_method": "awq"}),
            r"weights are quantised \(awq\); those of fp8",
        ),
        (lambda c: c.update(quantization_config="awq"), r"weights are quantised \(awq\)"),
        (lambda c: c["text_config"].update(hidden_size=None), "text_config: hidden_size is missing"),
        (lambda c: c["text_config"].update(hidden_act="gelu"), 'hidden_act is "gelu", this model family has "silu"'),
        (lambda c: c["text_config"].update(sliding_window=8), "sliding_window is 8"),
        (lambda c: c["text_config"].update(num_key_value_heads=3), "must be a multiple of kv_heads = 3"),
        (lambda c: c["text_config"].update(num_hidden_layers=0), "num_hidden_layers is 0, expected"),
        (lambda c: c["text_config"].pop("rope_parameters"), "rope_parameters is missing"),
        (lambda c: c["text_config"]["rope_parameters"].pop("rope_theta"), "rope_theta is missing"),
        (lambda c: c["text_config"]["rope_parameters"].update(rope_type="llama3"), "rope_type is 'llama3'"),
        (lambda c: c["vision_config"].pop("hidden_act"), 'vision_config: hidden_act is "gelu"'),
        (lambda c: c["vision_config"].update(hidden_size=18), "must equal width = 18"),
        (lambda c: c.update(vision_config=7), "vision_config is 7, expected an object"),
        (lambda c: c.update(vision_feature_layer=-2), "vision_feature_layer is -2"),
        (lambda c: c.update(multimodal_projector_bias=True), "multimodal_projector_bias is true"),
    ],
)
def test_other_architectures_are_refused_before_any_weights_are_read(exported, change, message):
    edit(exported, change)
    with pytest.raises(UserError, match=message):
        read_spec(exported)


def test_weights_that_do_not_fit_their_configuration_are_refused(exported, tmp_path):
    edit(exported, lambda c: c["text_config"].update(intermediate_size=30))
    message = r"layers.0.mlp.gate_proj.weight has shape \(28, 20\), its configuration says \(30, 20\)"
    with pytest.raises(UserError, match=message):
        import_checkpoint(exported)
    edit(exported, lambda c: c["text_config"].update(intermediate_size=28, num_hidden_layers=1))
    with pytest.raises(UserError, match=r"has unexpected tensor layers.1.input_layernorm.weight and 8 more"):
        import_checkpoint(exported)
    edit(exported, lambda c: c["text_config"].update(num_hidden_layers=2))
    path = exported / "model.safetensors"
    tensors = {name: np.array(t.read()) for name, t in safetensors.read(path).items()}
    write(path, {k: v.astype(np.int32) if "q_proj" in k else v for k, v in tensors.items()})
    with pytest.raises(UserError, match=r"q_proj.weight is int32; float32"):
        import_checkpoint(exported)
    write(exported / "other.safetensors", {"model.norm.weight": np.ones(3, np.float32)})
    with pytest.raises(UserError, match=r"stands twice, in model.safetensors and other.safetensors"):
        import_checkpoint(exported)


def test_directories_without_a_model_are_refused(tmp_path, exported):
    with pytest.raises(UserError, match=r"has no config.json"):
        import_checkpoint(tmp_path)
    (exported / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model.safetensors"):
        import_checkpoint(exported)
    (exported / "model.safetensors.index.json").write_text('{"weight_map": {"norm.weight": "gone.safetensors"}}')
    with pytest.raises(UserError, match=r"names gone.safetensors, which is not there"):
        import_checkpoint(exported)
    (exported / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match=r"index.json: expected a JSON object"):
        import_checkpoint(exported)
    (exported / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: not valid JSON"):
        import_checkpoint(exported)


def test_a_failed_export_harms_nothing(tmp_path, params, exported, monkeypatch):
    before = {f.name: f.read_bytes() for f in exported.iterdir()}
    other = jax.tree.map(lambda p: p + 1, params)

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "write", fail)
        with pytest.raises(OSError, match=r"disk full"):
            export_hf(other, SPEC, exported)
    assert {f.name: f.read_bytes() for f in exported.iterdir()} == before
    export_hf(other, SPEC, exported)
    assert same(import_checkpoint(exported)[1], other)
    assert [f.name for f in tmp_path.iterdir()] == ["hf"]


def test_exports_that_cannot_be_right_are_refused(tmp_path, params):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"is not an export of this program"):
        export_hf(params, SPEC, foreign)
    with pytest.raises(UserError, match=r"'float16'; float32 and bfloat16 can be written"):
        export_hf(params, SPEC, tmp_path / "hf", "float16")
    with pytest.raises(UserError, match=r"nowhere.json does not exist"):
        export_hf(params, SPEC, tmp_path / "hf", tokenizer_files=[tmp_path / "nowhere.json"])
    with pytest.raises(UserError, match=r"decoder/head .* is not part of this model"):
        export_hf(params, SPEC.model_copy(update={"tied": True}), tmp_path / "hf")
    vision = SPEC.vision.model_copy(update={"norm_eps": 1e-6})
    with pytest.raises(UserError, match=r"vision.norm_eps is 1e-06"):
        export_hf(params, SPEC.model_copy(update={"vision": vision}), tmp_path / "hf")
    assert not (tmp_path / "hf").exists() and (foreign / "thesis.txt").exists()
