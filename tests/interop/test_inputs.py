"""Hugging Face directories as people bring them: two sets of weights, old buffers, defaults left to the class."""

import itertools
import json

import numpy as np
import pytest
from interop_cases import SPEC, rename

from ministral_jax.errors import UserError
from ministral_jax.interop import safetensors
from ministral_jax.interop.checkpoint import import_checkpoint, read_spec
from ministral_jax.interop.hf_config import from_config, to_config
from ministral_jax.models.spec import PRESETS


def test_two_sets_of_weights(exported):
    shard, index = "model-00001-of-00001.safetensors", exported / "model.safetensors.index.json"
    (exported / shard).write_bytes((exported / "model.safetensors").read_bytes())
    names = [*safetensors.read(exported / shard)]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(
        UserError, match=r"has two sets of weights, model.safetensors and those of model.safetensors.in"
    ):
        import_checkpoint(exported)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    (exported / shard).unlink()
    assert import_checkpoint(exported)[0] == SPEC


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
        "language_model.model.rotary_emb.inv_freq",
        "language_model.model.rotary_emb.original_inv_freq",
        "language_model.model.layers.0.self_attn.rotary_emb.cos_cached",
        "vision_tower.patch_positional_embedding.inv_freq",
    ],
)
def test_buffers_of_older_releases(exported, name):
    rename(exported, str, **{name: np.ones(4, np.float32)})
    assert import_checkpoint(exported)[0] == SPEC


def test_a_byte_order_mark(exported):
    path = exported / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_spec(exported) == SPEC


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_pointer_is_no_checkpoint(exported, file):
    (exported / file).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(
        UserError, match=f"^{exported / file} is a Git LFS pointer, not the file itself; run `git lfs pull`"
    ):
        import_checkpoint(exported)


@pytest.mark.parametrize(("head", "top", "text"), [*itertools.product([True, False], *[[True, False, None]] * 2)])
def test_which_of_two_flags_ties(head, top, text):
    """A head in the file is kept; without one `text_config` decides, and the top level where it is silent."""
    config = to_config(SPEC, "float32")
    for section, value in ((config, top), (config["text_config"], text)):
        section.pop("tie_word_embeddings")
        if value is not None:
            section["tie_word_embeddings"] = value
    tied = not head and bool(top if text is None else text)
    spec = from_config(config, "config.json", head)
    assert spec.tied == tied
    written = to_config(spec, "float32")
    assert written["tie_word_embeddings"] == written["text_config"]["tie_word_embeddings"] == tied


def test_no_head_and_not_tied_is_refused(exported):
    rename(exported, lambda name: None if "lm_head" in name else name)
    with pytest.raises(UserError, match=r"lacks tensor lm_head\.weight"):
        import_checkpoint(exported)


SMALL = "mistral-small-3.1-24b"


@pytest.mark.parametrize(
    ("section", "key", "field", "value"),
    [
        ("text_config", "num_key_value_heads", "kv_heads", 8),
        ("text_config", "rms_norm_eps", "norm_eps", 1e-6),
        ("text_config", "num_attention_heads", "heads", 32),
        ("text_config", "max_position_embeddings", "context", 131072),
        ("vision_config", "hidden_size", "vision.width", 1024),
        ("vision_config", "intermediate_size", "vision.mlp_width", 4096),
        ("vision_config", "num_hidden_layers", "vision.layers", 24),
        ("vision_config", "num_attention_heads", "vision.heads", 16),
        ("vision_config", "patch_size", "vision.patch_size", 16),
    ],
)
def test_a_missing_size_is_the_classs(section, key, field, value):
    config = to_config(PRESETS[SMALL], "bfloat16")
    del config[section][key]
    found = from_config(config, "config.json", True)
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value


def test_a_size_of_null_is_what_the_class_makes_of_it():
    config = to_config(PRESETS[SMALL], "bfloat16")
    config["text_config"] |= {"head_dim": None, "num_key_value_heads": None}
    spec = from_config(config, "config.json", True)
    assert (spec.head_width, spec.kv_heads) == (5120 // 32, 32)
    del config["text_config"]["head_dim"]
    assert from_config(config, "config.json", True).head_width == 160


YARN = {"rope_type": "yarn", "type": "yarn", "rope_theta": 1e6, "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": "5120"}, "hidden_size is '5120', expected a whole number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected"),
        ({"num_attention_heads": [32]}, "num_attention_heads is .32., expected"),
        ({"head_dim": 128.5}, "head_dim is 128.5, expected"),
        ({"rope_theta": 5.0}, r"rope_theta is 5.0 and rope_theta of rope_parameters is 1000000000.0, which mean the s"),
        ({"rope_scaling": YARN}, "rope_parameters is .* and rope_scaling is .*, which mean the same; delete the one"),
        ({"rope_parameters": YARN | {"rope_type": "default"}}, 'rope_type is "default" and type is "yarn", which mean'),
        ({"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, this model family"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, this model family"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types has 'sliding_attention', this model"),
    ],
)
def test_sizes_that_are_none_and_settings_that_disagree(changes, sentence):
    config = to_config(PRESETS[SMALL], "bfloat16")
    config["text_config"] |= changes
    with pytest.raises(UserError, match=f"^config.json: text_config.*{sentence}"):
        from_config(config, "config.json", True)


def test_sizes_that_do_not_go_together():
    config = to_config(PRESETS[SMALL], "bfloat16")
    config["text_config"]["num_attention_heads"] = 12
    with pytest.raises(UserError, match=r"^config.json: heads = 12 must be a multiple of kv_heads = 8$"):
        from_config(config, "config.json", True)
    config["text_config"] |= {"num_attention_heads": 32, "head_dim": 3}
    with pytest.raises(UserError, match=r"^config.json: head_width: Input should be a multiple of 2$"):
        from_config(config, "config.json", True)


@pytest.mark.parametrize("changes", [{"rope_theta": 1e9}, {"layer_types": ["full_attention"] * 40}, {"head_dim": 128}])
def test_what_is_said_twice_and_agrees(changes):
    config = to_config(PRESETS[SMALL], "bfloat16")
    config["text_config"] |= changes
    assert from_config(config, "config.json", True) == PRESETS[SMALL]


PREFIXES = {
    "released": lambda name: name,
    "in memory": lambda name: "model." + name.replace("language_model.model.", "language_model."),
    "bare": lambda name: name.replace("language_model.", ""),
    "compiled": lambda name: f"_orig_mod.{name}",
    "wrapped": lambda name: f"module.{name}",
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_guard_prefixes_of_weight_names(exported, params, prefix):
    rename(exported, lambda name: "lm_head.weight" if "lm_head" in name else PREFIXES[prefix](name))
    if prefix in ("compiled", "wrapped"):
        with pytest.raises(UserError, match="lacks tensor"):
            import_checkpoint(exported)
        return
    read = import_checkpoint(exported)[1]
    assert np.array_equal(read["decoder"]["layers"]["mlp"]["up"], params["decoder"]["layers"]["mlp"]["up"])
    assert np.array_equal(read["vision"]["patch_embed"], params["vision"]["patch_embed"])


@pytest.mark.parametrize("metadata", [{}, {"metadata": None}, {"metadata": {}}, {"metadata": {"total_size": "?"}}])
def test_guard_an_index_without_a_total_size(exported, metadata):
    shard = "model-00001-of-00001.safetensors"
    (exported / "model.safetensors").rename(exported / shard)
    index = {**metadata, "weight_map": dict.fromkeys(safetensors.read(exported / shard), shard)}
    (exported / "model.safetensors.index.json").write_text(json.dumps(index))
    assert import_checkpoint(exported)[0] == SPEC


@pytest.mark.parametrize("weight_map", [{"a": 1}, {"a": ["b"]}, {"a": None}, [1], "a", {"a": "b", "c": 2}])
def test_an_index_that_names_no_files(exported, weight_map):
    (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"index.json: not a valid index"):
        import_checkpoint(exported)
