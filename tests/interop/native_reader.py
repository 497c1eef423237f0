"""Mistral's own format read by NumPy alone, in float64: pairs of neighbours are rotated, as complex numbers."""

import json

import numpy as np
from model_cases import IMG
from safetensors.numpy import load_file
from scipy.special import erf

from ministral_jax.models.rope import frequencies, yarn_frequencies
from ministral_jax.models.spec import RopeSpec


def logits(directory, document) -> np.ndarray:
    """[n, V] of one document, see `model_cases.Document`."""
    params = json.loads((directory / "params.json").read_text())
    weights = {}
    for file in directory.glob("consolidated*.safetensors"):
        weights |= {name: np.asarray(value, np.float64) for name, value in load_file(file).items()}
    x = weights["tok_embeddings.weight"][document.tokens]
    if document.images:
        x[document.tokens == IMG] = np.concatenate([_image(weights, params, image) for image in document.images])
    eps, width, places = params["norm_eps"], params["head_dim"], np.arange(len(x))
    yarn, scaling = params.get("yarn"), params.get("llama_4_scaling")
    rope = RopeSpec(theta=params["rope_theta"])
    if yarn:
        assert yarn["apply_scale"] is False
        ends = dict(beta_fast=yarn["beta"], beta_slow=yarn["alpha"], yarn_factor=yarn["factor"])
        rope = RopeSpec(theta=rope.theta, original_context=yarn["original_max_position_embeddings"], **ends)
    angles = places[:, None] * yarn_frequencies(width, rope)
    scale = np.ones(len(x))
    if scaling:
        scale = 1 + scaling["beta"] * np.log1p(places // scaling["original_max_position_embeddings"])
    for i in range(params["n_layers"]):
        x = _layer(weights, f"layers.{i}.", x, (width, eps), angles, (scale, places[:, None] >= places))
    head = weights["tok_embeddings.weight"] if params["tied_embeddings"] else weights["output.weight"]
    return _norm(x, weights["norm.weight"], eps) @ head.T


def _norm(x, gain, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def _rotate(x, angles):
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def _layer(weights, prefix, x, sizes, angles, attention):
    (width, eps), (scale, mask) = sizes, attention
    matrix = lambda name: weights[f"{prefix}{name}.weight"].T
    heads = lambda name, y: (y @ matrix(f"attention.{name}")).reshape(len(y), -1, width)
    y = _norm(x, matrix("attention_norm"), eps)
    q, k, v = _rotate(heads("wq", y), angles) * scale[:, None, None], _rotate(heads("wk", y), angles), heads("wv", y)
    k, v = (np.repeat(part, q.shape[1] // k.shape[1], axis=1) for part in (k, v))
    scores = np.where(mask, np.einsum("qhd,khd->hqk", q, k) / np.sqrt(width), -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("hqk,khd->qhd", shares / shares.sum(-1, keepdims=True), v)
    x = x + mixed.reshape(len(x), -1) @ matrix("attention.wo")
    y = _norm(x, matrix("ffn_norm"), eps)
    gate = y @ matrix("feed_forward.w1")
    return x + (gate / (1 + np.exp(-gate)) * (y @ matrix("feed_forward.w3"))) @ matrix("feed_forward.w2")


def _image(weights, params, image):
    """[rows * columns / merge², D] of an image [3, height, width]."""
    v = params["vision_encoder"]
    p, m, width = v["patch_size"], v["spatial_merge_size"], v["hidden_size"] // v["num_attention_heads"]
    rows, columns = image.shape[1] // p, image.shape[2] // p
    cut = image.reshape(3, rows, p, columns, p).astype(np.float64)
    x = np.einsum("cypxq,wcpq->yxw", cut, weights["vision_encoder.patch_conv.weight"]).reshape(rows * columns, -1)
    x = _norm(x, weights["vision_encoder.ln_pre.weight"], 1e-5)
    row, column = np.divmod(np.arange(rows * columns), columns)
    base = frequencies(width, v["rope_theta"])
    angles = np.concatenate([row[:, None] * base[0::2], column[:, None] * base[1::2]], axis=-1)
    everywhere = np.ones(len(x)), np.ones((len(x), len(x)), bool)
    for j in range(v["num_hidden_layers"]):
        x = _layer(weights, f"vision_encoder.transformer.layers.{j}.", x, (width, 1e-5), angles, everywhere)
    x = _norm(x, weights["pre_mm_projector_norm.weight"], 1e-5)
    blocks = x.reshape(rows // m, m, columns // m, m, -1).transpose(0, 2, 4, 1, 3)  # a value's neighbours side by side
    x = blocks.reshape(rows * columns // m**2, -1) @ weights["patch_merger.merging_layer.weight"].T
    x = x @ weights["vision_language_adapter.w_in.weight"].T
    return x * (1 + erf(x / np.sqrt(2))) / 2 @ weights["vision_language_adapter.w_out.weight"].T
