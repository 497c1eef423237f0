"""Every spelling of YaRN gives the frequencies and the magnitude that `transformers` makes of it."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoConfig  # noqa: E402
from transformers.models.ministral3.modeling_ministral3 import Ministral3RotaryEmbedding  # noqa: E402
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding  # noqa: E402
from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding  # noqa: E402

from ministral_jax.interop.hf_config import from_config, to_config  # noqa: E402
from ministral_jax.models.rope import frequencies, yarn_frequencies  # noqa: E402
from ministral_jax.models.spec import PRESETS  # noqa: E402

pytestmark = pytest.mark.parity

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 64.0, "original_max_position_embeddings": 4096}
RELEASED = YARN | {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0}
SPELLINGS = {
    "ministral 3": {"rope_parameters": RELEASED | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    "medium 3.5": {"rope_parameters": YARN | {"beta_fast": 4.0, "mscale": 1.0, "mscale_all_dim": 0.0}},
    "medium 3.5 as first released": {
        "rope_parameters": YARN | {"beta_fast": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    },
    "no mscale": {"rope_parameters": YARN},
    "mscale alone": {"rope_parameters": YARN | {"mscale": 0.5}},
    "two mscales": {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0}},
    "attention factor": {"rope_parameters": YARN | {"attention_factor": 1.3, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "rope_scaling and type": {"rope_scaling": {**YARN, "type": "yarn"}},
    "theta outside": {"rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}, "rope_theta": 1e5},
    "factor of null": {"rope_parameters": YARN | {"factor": None}},
    "no original context": {"rope_parameters": {k: v for k, v in YARN.items() if "original" not in k}},
    "betas of 0": {"rope_parameters": YARN | {"beta_fast": 0, "beta_slow": 0}},
    "plain": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e9}},
}


# The position temperature is ministral3's alone.
BOTH = [
    (name, kind)
    for name in SPELLINGS
    for kind in ("ministral3", "mistral")
    if (name, kind) != ("ministral 3", "mistral")
]


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_of_the_decoder(name, kind):
    embedding = {"ministral3": Ministral3RotaryEmbedding, "mistral": MistralRotaryEmbedding}[kind]
    config = to_config(PRESETS["ministral-3-8b"].model_copy(update={"vision": None}), "bfloat16") | {"model_type": kind}
    del config["rope_parameters"]
    config |= SPELLINGS[name]
    rope = from_config(config, "config.json", True).rope
    theirs = embedding(AutoConfig.for_model(**config))
    np.testing.assert_allclose(yarn_frequencies(128, rope), theirs.inv_freq.numpy(), rtol=2e-6)
    assert rope.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize(
    "said",
    [
        {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e3}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3}},
        {"rope_parameters": {"rope_theta": 1e3}},
        {"rope_theta": 1e3},
        {},
    ],
)
def test_of_the_vision_tower(said):
    config = to_config(PRESETS["mistral-medium-3.5-128b"], "bfloat16")
    del config["vision_config"]["rope_parameters"]
    config["vision_config"] |= said
    vision = from_config(config, "config.json", True).vision
    theirs = PixtralVisionRotaryEmbedding(AutoConfig.for_model(**config["vision_config"]))
    ours = frequencies(vision.head_width, vision.rope_theta)
    np.testing.assert_allclose(np.concatenate([ours[0::2], ours[1::2]]), theirs.inv_freq.numpy(), rtol=2e-6)
