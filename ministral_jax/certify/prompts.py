"""The fixed prompts on which files are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ministral_jax.data.images import image_tokens
from ministral_jax.data.tokenizer import Tokenizer
from ministral_jax.interop.hf_config import BOS
from ministral_jax.models.spec import ModelSpec

COMPARED = 64
"""Positions at the end of a prompt whose logits are compared."""
_TEXT = (
    "On the 3rd of June 1921 the ferry left at 7:45. Σ x² ≥ 0, so f(-2) = 4.\n"
    "def area(r):\n    return 3.14159 * r ** 2  # m²\nLe café était fermé ; それでも歩いた。"
)
_BREAK, _END = 12, 13


@dataclass(frozen=True)
class Prompt:
    """`tokens` int32 `[n]`; `picture` uint8 `[H, W, 3]`, whose sides are whole tokens, where one stands in it."""

    name: str
    tokens: np.ndarray
    picture: np.ndarray | None = None


def prompts(spec: ModelSpec, tokenizer: Tokenizer | None) -> list[Prompt]:
    """Text; text after a picture, where the model sees; and text that ends beyond the original length, where the model
    has one. Without a tokenizer ids stand for text that mean nothing, which compares as well."""
    if tokenizer is not None:
        ids = np.array(tokenizer.encode(_TEXT), np.int32)
    else:
        ids = np.random.default_rng(0).integers(min(14, spec.vocab - 1), spec.vocab, 3 * COMPARED).astype(np.int32)
    begin = np.array([BOS], np.int32)
    room = spec.context - 1
    found = [Prompt("text", np.concatenate([begin, ids[: min(2 * COMPARED, room)]]))]
    if spec.vision is not None:
        rows, columns = 3, 4
        marks = (spec.image_token, _BREAK, _END) if tokenizer is None else tokenizer.image_ids
        shown = np.array(image_tokens(rows, columns, marks), np.int32)
        if len(shown) < room:
            picture = _picture(rows * spec.vision.stride, columns * spec.vision.stride)
            tokens = np.concatenate([begin, shown, ids[: min(COMPARED, room - len(shown))]])
            found.append(Prompt("image", tokens, picture))
    original = spec.rope.original_context
    if original is not None and original < spec.context:
        length = min(original + COMPARED, spec.context)
        found.append(Prompt("long", np.concatenate([begin, np.resize(ids, length - 1)])))
    return found


def _picture(height: int, width: int) -> np.ndarray:
    """Colours that run into each other, and a dark disc."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    colours = np.stack([x, y, 0.5 + 0.5 * np.sin(9 * (x - y))], axis=-1)
    disc = (x - 0.4) ** 2 + (y - 0.3) ** 2 < 0.05
    return np.rint(255 * np.where(disc[..., None], 0.2 * colours, colours)).astype(np.uint8)
