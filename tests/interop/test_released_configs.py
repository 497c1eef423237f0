"""Configurations as Mistral's releases write them, at their own sizes and, with weights, at small ones.

Devstral Small 1.0 and 1.1 are Mistral Small 3.1 without its vision tower, as their cards say, and so are Magistral
Small 1.0 and 1.1; Magistral Small 1.2 is Mistral Small 3.2 and sees. Devstral Small 2 has the sizes of Mistral Small
3.1, YaRN up to 393,216 tokens with a position temperature, and FP8 weights of one scale a tensor; its base, and how it
divides its context into factor and original length, were not seen: those here stand for any.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from interop_cases import SPEC, to_fp8
from model_cases import random_params

from ministral_jax.doctor.examine import examine
from ministral_jax.interop.checkpoint import import_checkpoint
from ministral_jax.interop.hf import export_hf
from ministral_jax.interop.hf_config import from_config
from ministral_jax.models.spec import PRESETS, ModelSpec, RopeSpec

SMALL = PRESETS["mistral-small-3.1-24b"]
TEXT = SMALL.model_copy(update={"vision": None})
AGENT = SMALL.model_copy(
    update=dict(
        context=393_216, rope=RopeSpec(theta=1e8, yarn_factor=48.0, original_context=8192, temperature_beta=0.1)
    )
)


def sizes(spec: ModelSpec, kind: str, **positions) -> dict:
    """A decoder, without what these files leave to the class: no key says whether its embedding is tied."""
    return dict(
        model_type=kind, hidden_size=spec.width, intermediate_size=spec.mlp_width, num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads, head_dim=spec.head_width,
        vocab_size=spec.vocab, max_position_embeddings=spec.context, rms_norm_eps=1e-5, hidden_act="silu",
        attention_dropout=0.0, initializer_range=0.02, sliding_window=None, use_cache=True, **positions,
    )  # fmt: skip


def text_alone(spec: ModelSpec) -> dict:
    """Devstral Small 1.0 and 1.1, Magistral Small 1.0 and 1.1."""
    said = dict(architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16")
    return said | sizes(spec, "mistral", rope_theta=spec.rope.theta, tie_word_embeddings=False)


def seeing(spec: ModelSpec, text: dict) -> dict:
    """Magistral Small 1.2, of which the tower has a plain `rope_theta` too, and Devstral Small 2."""
    v = spec.vision
    tower = dict(
        model_type="pixtral", hidden_size=v.width, intermediate_size=v.mlp_width, num_hidden_layers=v.layers,
        num_attention_heads=v.heads, head_dim=v.head_width, hidden_act="silu", image_size=v.max_image_size,
        patch_size=v.patch_size, num_channels=3, attention_dropout=0.0, initializer_range=0.02, rope_theta=v.rope_theta,
    )  # fmt: skip
    return dict(
        architectures=["Mistral3ForConditionalGeneration"], model_type="mistral3", image_token_index=10,
        multimodal_projector_bias=False, projector_hidden_act="gelu", spatial_merge_size=v.merge,
        vision_feature_layer=-1, torch_dtype="bfloat16", text_config=text, vision_config=tower,
    )  # fmt: skip


def agent(spec: ModelSpec, **changes) -> dict:
    """Devstral Small 2."""
    r = spec.rope
    rope = dict(
        rope_type="yarn", type="yarn", rope_theta=r.theta, factor=r.yarn_factor, beta_fast=32.0, beta_slow=1.0,
        original_max_position_embeddings=r.original_context, llama_4_scaling_beta=r.temperature_beta,
        mscale=1.0, mscale_all_dim=1.0,
    )  # fmt: skip
    return seeing(spec, sizes(spec, "ministral3", rope_parameters=rope | changes))


@pytest.mark.parametrize("context", [131_072, 40_960])
def test_devstral_and_magistral_that_read_alone(context):
    spec = TEXT.model_copy(update={"context": context})
    assert from_config(text_alone(spec), "config.json", True) == spec


def test_magistral_that_sees():
    config = seeing(SMALL, sizes(SMALL, "mistral", rope_theta=1e9))
    assert from_config(config, "config.json", True) == SMALL


def test_devstral_2():
    assert from_config(agent(AGENT), "config.json", True) == AGENT


def test_of_devstral_2_a_dropped_temperature_is_amber_and_its_base_is_its_own(tmp_path):
    def said(**changes):
        (tmp_path / "config.json").write_text(json.dumps(agent(AGENT, **changes)))
        return [(f.level, f.said) for f in examine(tmp_path) if f.subject == "RoPE"]

    assert [level for level, _ in said()] == ["green"]
    assert [(level, "which Ministral 3 and Devstral" in text) for level, text in said(llama_4_scaling_beta=None)] == [
        ("green", False),
        ("amber", True),
    ]


ROPE = RopeSpec(theta=100.0, yarn_factor=4.0, original_context=16, temperature_beta=0.1)
SMALL_ONES = {
    "text alone": (SPEC.model_copy(update={"vision": None, "rope": RopeSpec(theta=1e9)}), text_alone),
    "seeing": (
        SPEC.model_copy(update={"rope": RopeSpec(theta=1e9)}),
        lambda spec: seeing(spec, sizes(spec, "mistral", rope_theta=1e9)),
    ),
    "agent": (SPEC.model_copy(update={"rope": ROPE}), agent),
}


@pytest.mark.parametrize("name", SMALL_ONES)
def test_weights_are_imported(tmp_path, name):
    spec, written = SMALL_ONES[name]
    params = random_params(spec)
    export_hf(params, spec, tmp_path)
    layers = params["decoder"]["layers"]
    expected = np.asarray(layers["mlp"]["up"])
    (tmp_path / "config.json").write_text(json.dumps(written(spec)))
    if name == "agent":
        means, held = to_fp8(tmp_path), expected.swapaxes(1, 2).copy()
        for n in range(spec.layers):
            held[n] = means[f"layers.{n}.mlp.up_proj.weight"]
        expected = held.swapaxes(1, 2)
    found, read = import_checkpoint(tmp_path)
    assert found == spec
    assert np.array_equal(read["decoder"]["layers"]["mlp"]["up"], expected)
    assert not [finding for finding in examine(tmp_path) if finding.level == "red"]
