"""The same model in torch: `transformers` with random weights, one document at a time."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from model_cases import Case, Document
from transformers import (
    Ministral3Config,
    Ministral3ForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PixtralVisionConfig,
)

from ministral_jax.models.spec import ModelSpec


def build(spec: ModelSpec, seed: int = 0) -> torch.nn.Module:
    """A `transformers` model with the sizes of `spec`, every parameter random. It is configured here by hand, not by
    the project's own writer."""
    r = spec.rope
    sizes = dict(
        vocab_size=spec.vocab, hidden_size=spec.width, intermediate_size=spec.mlp_width, num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads, head_dim=spec.head_width,
        max_position_embeddings=spec.context, rms_norm_eps=spec.norm_eps, sliding_window=None, pad_token_id=None,
        tie_word_embeddings=spec.tied,
    )  # fmt: skip
    if r.yarn_factor == 1 and r.temperature_beta == 0:
        text = MistralConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": r.theta})
        causal = MistralForCausalLM
    else:
        rope = {"rope_type": "default", "rope_theta": r.theta, "llama_4_scaling_beta": r.temperature_beta}
        rope["original_max_position_embeddings"] = r.original_context
        if r.yarn_factor > 1:
            rope |= {"rope_type": "yarn", "factor": r.yarn_factor, "attention_factor": r.attention_factor}
            rope |= {"beta_fast": r.beta_fast, "beta_slow": r.beta_slow}
        text = Ministral3Config(**sizes, rope_parameters=rope)
        causal = Ministral3ForCausalLM
    if (v := spec.vision) is None:
        model = causal(text)
    else:
        vision = PixtralVisionConfig(
            hidden_size=v.width, intermediate_size=v.mlp_width, num_hidden_layers=v.layers, hidden_act="silu",
            num_attention_heads=v.heads, patch_size=v.patch_size, image_size=v.max_image_size,
            rope_parameters={"rope_type": "axial", "rope_theta": v.rope_theta},
        )  # fmt: skip
        config = Mistral3Config(
            vision_config=vision, text_config=text, spatial_merge_size=v.merge, tie_word_embeddings=spec.tied
        )
        model = Mistral3ForConditionalGeneration(config)
    random = np.random.RandomState(seed)
    with torch.no_grad():
        for p in model.parameters():
            value = random.standard_normal(p.shape)
            scale = 1 + 0.3 * value if p.ndim == 1 else value * np.prod(p.shape[1:]) ** -0.5
            p.copy_(torch.from_numpy(scale))
    model.set_attn_implementation("eager")
    return model.eval()


def load(directory: Path, spec: ModelSpec) -> torch.nn.Module:
    """A saved model, as a user would load it; nothing may be missing or left over."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForCausalLM if spec.vision is None else AutoModelForImageTextToText
    model, info = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    model.set_attn_implementation("eager")
    return model.eval()


def forward(model: torch.nn.Module, document: Document) -> torch.Tensor:
    """Logits [n, V] of one document."""
    images = {}
    if document.images:
        sizes = [image.shape[1:] for image in document.images]
        height, width = np.max(sizes, axis=0)
        pixels = np.zeros((len(sizes), 3, height, width), np.float32)
        for padded, image in zip(pixels, document.images, strict=True):
            padded[:, : image.shape[1], : image.shape[2]] = image
        images = {"pixel_values": torch.from_numpy(pixels), "image_sizes": torch.tensor(sizes)}
    tokens = torch.from_numpy(document.tokens.astype(np.int64))[None]
    return model(tokens, **images).logits[0].float()


def run(model: torch.nn.Module, case: Case) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Logits [n, V] of every document, and the gradients of the tests' loss by name without prefixes."""
    logits, total = [], torch.zeros(())
    for document in case.documents:
        out, place = forward(model, document), np.arange(len(document.tokens))
        labels = torch.from_numpy((document.tokens * 7 + place * 5) % case.spec.vocab)
        weights = torch.from_numpy(0.5 + (place * 3 % 5) / 5).float()
        picked = torch.log_softmax(out, -1).gather(1, labels[:, None].long())[:, 0]
        total = total - (picked * weights).sum()
        logits.append(out.detach().numpy())
    model.zero_grad()
    total.backward()
    grads = {short(name): p.grad.numpy() for name, p in model.named_parameters()}
    return logits, grads


def short(name: str) -> str:
    return re.sub(r"^(language_model\.|model\.)+", "", name)
