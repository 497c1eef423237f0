"""Mistral's own format against torch `transformers`: weights turned there by the rule of its conversion scripts."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import oracle  # noqa: E402
from model_cases import Case, image_case, inputs, pack, relative  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from ministral_jax.interop.checkpoint import import_checkpoint  # noqa: E402
from ministral_jax.interop.export import Export, export  # noqa: E402
from ministral_jax.interop.native import NATIVE  # noqa: E402
from ministral_jax.interop.native_config import to_params  # noqa: E402
from ministral_jax.models.spec import ModelSpec, RopeSpec, VisionSpec  # noqa: E402
from ministral_jax.models.vlm import VLM  # noqa: E402

pytestmark = pytest.mark.parity

RULES = (
    (r"^lm_head", "output"), (r"^model\.(language_model\.)?embed_tokens", "tok_embeddings"),
    (r"^model\.(language_model\.)?(norm|layers)", r"\2"), (r"^model\.vision_tower", "vision_encoder"),
    (r"^model\.multi_modal_projector\.norm", "pre_mm_projector_norm"),
    (r"^model\.multi_modal_projector\.patch_merger", "patch_merger"),
    (r"^model\.multi_modal_projector\.linear_1", "vision_language_adapter.w_in"),
    (r"^model\.multi_modal_projector\.linear_2", "vision_language_adapter.w_out"),
    (r"input_layernorm", "attention_norm"), (r"post_attention_layernorm", "ffn_norm"),
    (r"(self_attn|attention)\.(\w)_proj", r"attention.w\2"), (r"mlp\.|feed_forward\.", "feed_forward."),
    (r"gate_proj", "w1"), (r"down_proj", "w2"), (r"up_proj", "w3"),
)  # fmt: skip


def native(model: torch.nn.Module, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Weights of a `transformers` model under native names, a head's halves of q and k turned into pairs."""
    found = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and spec.tied:
            continue
        for old, new in RULES:
            name = re.sub(old, new, name)
        if re.search(r"\.w[qk]\.", name):
            width = spec.vision.head_width if spec.vision and name.startswith("vision") else spec.head_width
            value = value.view(-1, 2, width // 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
        found[name] = value.contiguous()
    return found


def odd(tied: bool) -> Case:
    """Three key-value heads, heads that do not fill the width, and patches of three pixels."""
    tower = VisionSpec(layers=2, width=36, mlp_width=20, heads=3, head_width=12, patch_size=3, max_image_size=64)
    return image_case(
        ModelSpec(
            layers=2, width=28, mlp_width=36, heads=6, kv_heads=3, head_width=10, vocab=50, context=256, tied=tied,
            rope=RopeSpec(theta=1e3, yarn_factor=16, original_context=16, temperature_beta=0.5, beta_fast=4.0),
            vision=tower,
        )
    )  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_both_directions_give_the_logits_of_transformers(tied, tmp_path):
    case = odd(tied)
    model, spec = oracle.build(case.spec), case.spec
    theirs = native(model, spec)
    (tmp_path / "theirs").mkdir()
    save_file(theirs, tmp_path / "theirs/consolidated.safetensors")
    (tmp_path / "theirs/params.json").write_text(json.dumps(to_params(spec)))

    read, params = import_checkpoint(tmp_path / "theirs")
    assert read == spec
    batch = pack(case)
    ours = np.asarray(VLM(spec).apply({"params": params}, **inputs(batch)))
    rows = [(b, batch["segments"][b] == s) for b in range(len(ours)) for s in range(1, batch["segments"][b].max() + 1)]
    with torch.no_grad():
        expected = [oracle.forward(model, document).numpy() for document in case.documents]
    assert relative(np.concatenate([ours[row] for row in rows]), np.concatenate(expected)) < 2e-5

    export(Export(params, spec, "float32"), NATIVE, tmp_path / "ours")
    written = load_file(tmp_path / "ours/consolidated.safetensors")
    assert written.keys() == theirs.keys()
    assert all(torch.equal(written[name], theirs[name]) for name in theirs)
