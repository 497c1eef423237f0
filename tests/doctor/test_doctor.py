"""A checkpoint is fine, and with each planted fault the line that names it is there."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from interop_cases import SPEC, rename, write
from model_cases import random_params

from ministral_jax import cli
from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.tokenizer import export_tokenizer, load_tokenizer
from ministral_jax.doctor.examine import examine
from ministral_jax.doctor.weights import INDEX
from ministral_jax.interop import export, hf, safetensors
from ministral_jax.models.spec import PRESETS

WIDER = SPEC.model_copy(update={"vocab": 320})
TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """In three shards, with tokenizer and template."""
    place = tmp_path_factory.mktemp("sound")
    tokenizer = load_tokenizer(TokenizerConfig(file="bundled", vocab=320, special=64), place)
    whole, export.SHARD_BYTES = export.SHARD_BYTES, 45_000
    try:
        hf.export_hf(
            random_params(WIDER), WIDER, place / "hf", "float32", [export_tokenizer(tokenizer, place, WIDER.vision)]
        )
    finally:
        export.SHARD_BYTES = whole
    (place / "hf" / "chat_template.jinja").write_text(TEMPLATE)
    return place / "hf"


@pytest.fixture
def copy(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "hf")


def edit(directory, name, change) -> None:
    path = directory / name
    value = json.loads(path.read_text()) if path.is_file() else {}
    change(value)
    path.write_text(json.dumps(value))


def rope(config):
    return config["text_config"]["rope_parameters"]


def shard(directory, number):
    return sorted(directory.glob("model-*.safetensors"))[number]


def rewrite(directory, change, **more):
    """All weights in one file, as `change` names them."""
    held = {}
    for path in directory.glob("model-*.safetensors"):
        held |= {name: np.array(t.read()) for name, t in safetensors.read(path).items()}
        path.unlink()
    (directory / "model.safetensors.index.json").unlink()
    write(directory / "model.safetensors", {change(k): v for k, v in held.items() if change(k)} | more)


def pointer(path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def in_eight_bits(directory) -> None:
    rewrite(directory, lambda name: name)
    q = "language_model.model.layers.0.self_attn.q_proj.weight"
    shape = (SPEC.heads * SPEC.head_width, SPEC.width)
    rename(directory, lambda name: name if name != q else None, **{q: np.ones(shape, ml_dtypes.float8_e4m3fn)})


NORM = "language_model.model.norm.weight"
FAULTS = {
    "a pointer in the place of a shard": (lambda d: pointer(shard(d, 0)), "red", "Git LFS pointer"),
    "a shard that is missing": (lambda d: shard(d, 1).unlink(), "red", r"shards are missing: .*model-00002-of"),
    "a shard too many": (
        lambda d: shutil.copy(shard(d, 0), d / "model-00009-of-00009.safetensors"), "amber", "model-00009-of-00009",
    ),
    "another save beside the index": (
        lambda d: shutil.copy(shard(d, 0), d / "model.safetensors"), "red", "two sets of weights, model.safetensors an",
    ),
    "another save": (
        lambda d: (shutil.copy(shard(d, 0), d / "weights.safetensors"), (d / INDEX).unlink()),
        "red", r"embed_tokens.weight stands twice, in model-00001-of-.* and weights.safetensors",
    ),
    "a link that leads nowhere": (
        lambda d: (shard(d, 0).unlink(), (d / "model-00001-of-00003.safetensors").symlink_to("gone")),
        "red", "model-00001-of-00003.safetensors: a link to what is not there",
    ),
    "weights in whole numbers": (
        lambda d: rewrite(d, lambda n: n, **{NORM: np.ones(SPEC.width, np.int32)}), "red", "norm.weight is int32; flo",
    ),
    "an adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), "red", "merge it into"),
    "a shard that is cut short": (lambda d: shard(d, 1).write_bytes(shard(d, 1).read_bytes()[:-8]), "red", "cut short"),
    "a tensor that is missing": (
        lambda d: rewrite(d, lambda n: n if n != NORM else None), "red", "missing: norm.weight",
    ),
    "a tensor too many": (
        lambda d: rewrite(d, lambda n: n, **{"extra.bias": np.zeros(2, np.float32)}), "red", "model: extra.bias",
    ),
    "a tensor of another shape": (
        lambda d: rewrite(d, lambda n: n, **{NORM: np.ones(7, np.float32)}), "red", r"norm.weight has shape \[7\]",
    ),
    "no head, untied": (lambda d: rewrite(d, lambda n: n if "lm_head" not in n else None), "red", "without a head"),
    "flags of tying that differ": (
        lambda d: edit(d, "config.json", lambda c: c.update(tie_word_embeddings=True)), "amber", "lose the head",
    ),
    "FP8 without a scale": (in_eight_bits, "red", "no weight_scale_inv beside layers.0.self_attn.q_proj.weight"),
    "FP8 of which the configuration says nothing": (in_eight_bits, "red", "has no quantization_config"),
    "weights quantised in another way": (
        lambda d: edit(d, "config.json", lambda c: c.update(quantization_config={"quant_method": "awq"})),
        "red", r"weights are quantised \(awq\)",
    ),
    "YaRN that rescales": (
        lambda d: edit(d, "config.json", lambda c: rope(c).pop("mscale")), "amber", "cos and sin grow by 1.1386",
    ),
    "a temperature that was dropped": (
        lambda d: edit(d, "config.json", lambda c: rope(c).pop("llama_4_scaling_beta")), "amber", "temperature is off",
    ),
    "a tower with the class's activation": (
        lambda d: edit(d, "config.json", lambda c: c["vision_config"].pop("hidden_act")), "red", "hidden_act is None",
    ),
    "a stale processor": (
        lambda d: edit(d, "processor_config.json", lambda c: c.update(spatial_merge_size=1)), "red", "another grid",
    ),
    "a tokenizer of tomorrow": (
        lambda d: edit(d, "tekken.json", lambda t: t["config"].update(version="v99")), "red", "knows no v99, but v1",
    ),
    "a tokenizer of yesterday": (
        lambda d: edit(d, "tekken.json", lambda t: t["config"].update(version="v11")), "amber", "without tools and rea",
    ),
    "more ids than rows": (
        lambda d: edit(d, "tekken.json", lambda t: t["config"].update(default_vocab_size=400)), "red", "320 rows",
    ),
    "a padded vocabulary": (
        lambda d: edit(d, "tekken.json", lambda t: t["config"].update(default_vocab_size=300)), "amber", "last 20",
    ),
    "another id of pictures": (
        lambda d: edit(d, "config.json", lambda c: c.update(image_token_index=14)), "red", r"\[IMG\] is 10",
    ),
    "another end": (
        lambda d: edit(d, "generation_config.json", lambda c: c.update(eos_token_id=7)), "red", "eos_token_id 7",
    ),
    "two beginnings": (
        lambda d: edit(d, "tokenizer_config.json", lambda c: c.update(add_bos_token=True)), "amber", "has two",
    ),
    "templates that differ": (
        lambda d: edit(d, "tokenizer_config.json", lambda c: c.update(chat_template="{{ bos_token }}")),
        "red", "tokenizer_config.json differ",
    ),
    "a template of another tokenizer": (
        lambda d: (d / "chat_template.jinja").write_text(TEMPLATE + "[AUDIO]"), "red", r"\[AUDIO\] in the template",
    ),
    "a template that is a pointer": (lambda d: pointer(d / "chat_template.jinja"), "red", "jinja is a Git LFS pointer"),
    "another rule of splitting": (
        lambda d: edit(d, "tokenizer.json", lambda t: t.update(pre_tokenizer={"pattern": {"Regex": "x"}})),
        "amber", "fix_mistral_regex",
    ),
    "two models": (
        lambda d: edit(d, "params.json", lambda p: p.update(dim=24)), "red", "dim 24, config.json 20",
    ),
    "code of its own": (
        lambda d: edit(d, "config.json", lambda c: c.update(auto_map={"AutoModel": "modeling_own.Own"})),
        "amber", "config.json names code of its own in auto_map, AutoModel modeling_own.Own: .*never run here",
    ),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), "red", "config.json: not valid JSON"),
    "nonsense": (
        lambda d: edit(d, "tekken.json", lambda t: t.update(special_tokens=[3])), "red", "form that nothing reads",
    ),
}  # fmt: skip


def test_a_sound_checkpoint_is_green(sound, capsys):
    assert cli.main(["doctor", str(sound)]) == 0
    said = capsys.readouterr().out
    assert "0 red, 0 amber" in said, said
    assert "preset" in said and "Tekken v13, 320 ids" in said and "THINK" in said


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(copy, fault):
    plant, level, words = FAULTS[fault]
    plant(copy)
    found = examine(copy)
    named = [finding for finding in found if finding.level == level and re.search(words, finding.said)]
    assert named, found
    assert cli.main(["doctor", str(copy)]) == int(any(finding.level == "red" for finding in found))


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.startswith(("a pointer", "a shard that"))])
def test_what_cannot_be_read_is_not_called_missing(copy, fault):
    FAULTS[fault][0](copy)
    assert not {finding.subject for finding in examine(copy)} & {"tensors", "tying", "FP8"}


@pytest.mark.parametrize(("file", "words"), [("manifest.json", "ministral-jax export"), ("model.gguf", "certify")])
def test_what_is_made_here_is_told_what_it_is_for(tmp_path, file, words, capsys):
    (tmp_path / file).write_text("{}")
    assert cli.main(["doctor", str(tmp_path)]) == 1
    assert words in capsys.readouterr().out


def test_a_class_default_of_theta_is_named(copy):
    config = hf.to_config(PRESETS["ministral-3-14b"], "bfloat16")
    rope(config)["rope_theta"] = 1e6
    (copy / "config.json").write_text(json.dumps(config))
    assert any(f.level == "red" and "ministral-3-14b has 1e+09" in f.said for f in examine(copy))


def test_each_model_has_the_magnitude_of_its_own_yarn(tmp_path):
    """Mistral Medium 3.5's cos and sin grow, and it was first released with a configuration in which they do not."""
    edit(tmp_path, "config.json", lambda c: c.update(hf.to_config(PRESETS["mistral-medium-3.5-128b"], "bfloat16")))
    of_rope = lambda: [f for f in examine(tmp_path) if f.subject == "RoPE"]
    assert [f.level for f in of_rope()] == ["green"]
    edit(tmp_path, "config.json", lambda c: rope(c).update(mscale_all_dim=1.0))
    assert [(f.level, "grow by 1.0000, those of" in f.said) for f in of_rope()] == [("green", False), ("amber", True)]
