"""Rotary positions: every way to write them, and what cannot be read."""

from __future__ import annotations

import json
from math import log

import numpy as np
import pytest

from ministral_jax.errors import UserError
from ministral_jax.interop.hf_config import from_config, to_config
from ministral_jax.models.rope import frequencies, yarn_frequencies
from ministral_jax.models.spec import PRESETS, ModelSpec, RopeSpec, VisionSpec

SMALL, MEDIUM = "mistral-small-3.1-24b", "mistral-medium-3.5-128b"
SIZES = dict(
    layers=2, width=20, mlp_width=28, heads=4, kv_heads=2, head_width=8, vocab=48, context=64, vision=None
)  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
MAGNITUDE = 0.1 * log(4) + 1


def read(kind: str, **said) -> RopeSpec:
    """Of a decoder whose file says of positions no more than this."""
    config = to_config(ModelSpec(**SIZES), "float32") | {"model_type": kind}
    del config["rope_parameters"]
    return from_config(config | said, "config.json", True).rope


@pytest.mark.parametrize(
    ("said", "spec"),
    [
        ({"rope_parameters": YARN}, {"attention_factor": MAGNITUDE}),
        ({"rope_scaling": YARN}, {"attention_factor": MAGNITUDE}),
        (
            {"rope_scaling": {k: v for k, v in YARN.items() if k != "rope_type"} | {"type": "yarn"}},
            {"attention_factor": MAGNITUDE},
        ),
        ({"rope_parameters": {**YARN, "rope_theta": None}, "rope_theta": 100.0}, {"attention_factor": MAGNITUDE}),
        ({"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, {}),
        ({"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.0}}, {"attention_factor": MAGNITUDE}),
        ({"rope_parameters": YARN | {"mscale": 0.5}}, {"attention_factor": MAGNITUDE}),
        (
            {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0}},
            {"attention_factor": (0.0707 * log(4) + 1) / MAGNITUDE},
        ),
        ({"rope_parameters": YARN | {"attention_factor": 1.25, "mscale": 1.0}}, {"attention_factor": 1.25}),
        ({"rope_parameters": YARN | {"factor": None}}, {"attention_factor": MAGNITUDE}),
        (
            {"rope_parameters": {k: v for k, v in YARN.items() if "original" not in k}},
            {"attention_factor": MAGNITUDE, "original_context": 64},
        ),
        (
            {"rope_parameters": YARN | {"beta_fast": 4, "beta_slow": 0.0, "llama_4_scaling_beta": 0.1}},
            {"attention_factor": MAGNITUDE, "beta_fast": 4.0, "temperature_beta": 0.1},
        ),
    ],
)
def test_yarn_as_transformers_reads_it(said, spec):
    plain = RopeSpec(theta=100.0, yarn_factor=4.0, original_context=16)
    assert read("ministral3", **said).model_dump() == pytest.approx(plain.model_dump() | spec)


def test_medium_is_written_as_it_was_released_and_comes_back():
    config = json.loads(json.dumps(to_config(PRESETS[MEDIUM], "bfloat16")))
    rope = config["text_config"]["rope_parameters"]
    assert (rope["factor"], rope["beta_fast"], rope["mscale"], rope["mscale_all_dim"]) == (64, 4, 1, 0)
    assert from_config(config, "config.json", True) == PRESETS[MEDIUM]
    odd = RopeSpec(yarn_factor=2.0, original_context=32, attention_factor=1.25)
    spec = ModelSpec(**SIZES | {"rope": odd})
    assert from_config(to_config(spec, "float32"), "config.json", True) == spec


@pytest.mark.parametrize(("theta", "pair"), [(1e6, 23), (1e4, 35), (1e8, 17), (1e9, 15)])
def test_mediums_base_is_the_one_whose_band_begins_at_pair_23(theta, pair):
    """As GaijinEntertainment/daScript#3479 says of a GGUF of it; other bases that the family has begin elsewhere."""
    rope = PRESETS[MEDIUM].rope
    slowed = yarn_frequencies(128, rope.model_copy(update={"theta": theta})) / frequencies(128, theta)
    assert np.flatnonzero(slowed == 1)[-1] == pair
    assert (rope.theta == theta) == (pair == 23)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("form", [{"rope_type": "axial"}, {"type": "default"}, {}])
def test_positions_of_patches(key, form):
    config = to_config(PRESETS[SMALL], "bfloat16")
    del config["vision_config"]["rope_parameters"]
    config["vision_config"][key] = form | {"rope_theta": 1e3}
    vision = from_config(config, "config.json", True).vision
    assert vision == VisionSpec(rope_theta=1e3)


@pytest.mark.parametrize(
    ("kind", "said", "sentence"),
    [
        (
            "ministral3",
            {"rope_parameters": {"full_attention": YARN}, "rope_theta": 1.5},
            "'full_attention' has positions of",
        ),
        (
            "ministral3",
            {"rope_parameters": YARN | {"rope_type": "longrope"}},
            "rope_type is 'longrope'; default and yarn",
        ),
        ("ministral3", {"rope_parameters": YARN | {"truncate": False}}, "truncate is false"),
        ("ministral3", {"rope_parameters": {k: v for k, v in YARN.items() if k != "factor"}}, "factor is missing"),
        ("ministral3", {"rope_parameters": YARN | {"factor": "4"}}, "factor is '4', expected a number"),
        ("ministral3", {"rope_parameters": YARN | {"mscale": [1]}}, r"mscale is \[1\], expected a number"),
        ("ministral3", {"rope_parameters": YARN | {"factor": 0.5}}, "yarn_factor: .*greater than or equal to 1"),
        (
            "ministral3",
            {"rope_parameters": YARN, "original_max_position_embeddings": 8},
            "original_max_position_embeddings is 8 and that of .* is 16, which mean the same",
        ),
        ("mistral", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}, "0.1, which is ministral3's, but model"),
        ("mistral4", {"rope_parameters": YARN}, "model_type is 'mistral4'"),
    ],
)
def test_positions_that_cannot_be_read_are_refused(kind, said, sentence):
    with pytest.raises(UserError, match=sentence):
        read(kind, **said)


def test_mistral_small_4_is_refused_by_name():
    config = to_config(PRESETS[SMALL], "bfloat16")
    config["text_config"]["model_type"] = "mistral4"
    with pytest.raises(UserError, match=r"text_config: model_type is 'mistral4', Mistral Small 4, which has latent"):
        from_config(config, "config.json", True)


@pytest.mark.parametrize("rotations", [0.0, -1.0, float("inf")])
def test_rotations_of_yarn_are_above_zero(rotations):
    with pytest.raises(ValueError, match="beta_fast"):
        RopeSpec(yarn_factor=2.0, original_context=32, beta_fast=rotations)
