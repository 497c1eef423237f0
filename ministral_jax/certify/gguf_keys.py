"""What the keys of GGUF files say of a model, as llama.cpp understands them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ministral_jax.errors import UserError
from ministral_jax.interop.keys import refused
from ministral_jax.interop.rope_config import attention_factor
from ministral_jax.models.spec import ModelSpec, RopeSpec, VisionSpec

_DECODER = {
    "vocab": "vocab_size",
    "context": "context_length",
    "width": "embedding_length",
    "layers": "block_count",
    "mlp_width": "feed_forward_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_width": "attention.key_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}
_TOWER = {
    "layers": "block_count",
    "width": "embedding_length",
    "mlp_width": "feed_forward_length",
    "heads": "attention.head_count",
    "patch_size": "patch_size",
    "max_image_size": "image_size",
    "merge": "spatial_merge_size",
    "norm_eps": "attention.layer_norm_epsilon",
}


@dataclass(frozen=True)
class Keys:
    """The keys of a file that begin with `prefix`."""

    path: Path
    prefix: str
    values: Mapping[str, Any]

    def number(self, name: str, trained: float | None, absent: float | None = None) -> Any:
        """What stands under a key, or the training's value where the file has that one rounded to float32; `absent`
        where there is no such key. Raises `UserError`: it is no number."""
        value = self.values.get(f"{self.prefix}.{name}", absent)
        if value is not None and type(value) not in (int, float):
            raise UserError(f"{self.path}: {self.prefix}.{name} is {value!r:.80}, expected a number")
        return trained if _same(value, trained) else value


def _same(value: float | None, trained: float | None) -> bool:
    return value is not None and trained is not None and np.float32(value) == np.float32(trained)


def spec_of(decoder: Keys, tower: Keys | None, tied: bool, trained: ModelSpec) -> ModelSpec:
    """Sizes and positions of a model in GGUF files. A tower has no key for the width of a head and for its θ, which are
    those of `trained`.

    Raises:
        UserError: a key is missing, or has a value that no model of this family has.
    """
    found = {ours: decoder.number(name, getattr(trained, ours)) for ours, name in _DECODER.items()}
    try:
        rope = RopeSpec(**_rope(decoder, trained.rope, found["context"]))
        vision = None
        if tower is not None and (v := trained.vision) is not None:
            sizes = {ours: tower.number(name, getattr(v, ours)) for ours, name in _TOWER.items()}
            vision = VisionSpec.model_validate(v.model_dump() | sizes)
        parts = {"rope": rope, "vision": vision, "tied": tied}
        return ModelSpec.model_validate(trained.model_dump() | found | parts)
    except ValidationError as error:
        raise refused(error, str(decoder.path.parent)) from None


def _rope(keys: Keys, trained: RopeSpec, context: int) -> dict[str, Any]:
    """Defaults and the factor of cosines are llama.cpp's (`llama_model_base::load_hparams`, `llama_context`)."""
    theta = keys.number("rope.freq_base", trained.theta, 1e4)
    beta = keys.number("attention.temperature_scale", trained.temperature_beta, 0.0)
    factor = keys.number("rope.scaling.factor", trained.yarn_factor, 1.0)
    absent = None if factor == 1 and beta == 0 else context
    original = keys.number("rope.scaling.original_context_length", trained.original_context, absent)
    found = {"theta": theta, "temperature_beta": beta, "original_context": original}
    if factor == 1:
        return found | {"beta_fast": trained.beta_fast, "beta_slow": trained.beta_slow}
    if (form := keys.values.get(f"{keys.prefix}.rope.scaling.type", "linear")) != "yarn":
        raise UserError(f"{keys.path}: {keys.prefix}.rope.scaling.type is {form!r:.80}; yarn can be certified")
    rescaled = attention_factor(factor, 1.0, keys.number("rope.scaling.yarn_log_multiplier", None, 0.0))
    rescaled *= keys.number("rope.scaling.attn_factor", None, 1.0)
    return found | {
        "yarn_factor": factor,
        "attention_factor": trained.attention_factor if _same(rescaled, trained.attention_factor) else rescaled,
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", trained.beta_fast, 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", trained.beta_slow, 1.0),
    }
