"""Documents and conversations as token ids, with a flag on each token that may be a target.

The format is Tekken v13's (mistral-common): `<s>[SYSTEM_PROMPT]..[/SYSTEM_PROMPT][INST]..[/INST]answer</s>`, no spaces
around control tokens, reasoning as `[THINK]..[/THINK]` before the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ministral_jax.data.images import image_tokens, open_image, resize, token_grid
from ministral_jax.data.tokenizer import Tokenizer
from ministral_jax.errors import UserError
from ministral_jax.models.spec import VisionSpec

TRAINABLE, ANSWER, TEXT = 1, 2, 4
"""Flags of a token as a target: it counts in the loss; it answers after an image, reasoning aside; it is plain text."""


@dataclass(frozen=True)
class Thought:
    """Reasoning before an answer."""

    text: str


Part = str | Thought | Path | Image.Image


@dataclass(frozen=True)
class Message:
    """One turn: text, reasoning and images (as paths, or decoded in RGB)."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Rendered:
    """A document: `tokens` uint32 `[N]`, `flags` uint8 `[N]`, and its resized pictures, uint8 `[H, W, 3]`, in order."""

    tokens: np.ndarray
    flags: np.ndarray
    pictures: tuple[np.ndarray, ...] = ()


def render_text(text: str, tokenizer: Tokenizer) -> Rendered:
    """`<s>text</s>`, every token but the first a target."""
    tokens = np.array(tokenizer.encode(text, bos=True, eos=True), np.uint32)
    return Rendered(tokens, np.full(tokens.shape, TRAINABLE | TEXT, np.uint8))


def render(
    messages: tuple[Message, ...], tokenizer: Tokenizer, vision: VisionSpec | None, where: str, max_pixels: int
) -> Rendered:
    """A conversation as tokens; the assistant's tokens and the `</s>` after them are targets.

    A conversation that ends with the user's turn is a prompt: it ends with `[/INST]`.

    Raises:
        UserError: an image cannot be used, or the model has no vision; begins with `where`.
    """
    tokens, flags = [tokenizer.bos], [0]
    pictures: list[np.ndarray] = []

    def add(ids: list[int], flag: int) -> None:
        tokens.extend(ids)
        flags.extend([flag] * len(ids))

    for message in messages:
        opening, closing = _brackets(message.role, tokenizer)
        trainable = TRAINABLE if message.role == "assistant" else 0
        add(opening, 0)
        for part in _ordered(message):
            if isinstance(part, str):
                add(tokenizer.encode(part), trainable | ANSWER if trainable and pictures else trainable)
            elif isinstance(part, Thought):
                thinking = tokenizer.encode(part.text)
                add([tokenizer.special("[THINK]"), *thinking, tokenizer.special("[/THINK]")], trainable)
            else:
                if vision is None:
                    raise UserError(
                        f"{where}: has an image but the model has no vision; use a model that has, or drop it"
                    )
                image = open_image(part, where, max_pixels) if isinstance(part, Path) else part
                pictures.append(resize(image, vision))
                add(image_tokens(*token_grid(*image.size, vision), tokenizer.image_ids), 0)
        add(closing, trainable)
    return Rendered(np.array(tokens, np.uint32), np.array(flags, np.uint8), tuple(pictures))


def parse_messages(raw: Any, base: Path, where: str) -> tuple[Message, ...]:
    """Check and convert messages in the OpenAI style; image paths are relative to `base`.

    Accepted content is a string or a list of `{"type": "text", "text": ..}`, `{"type": "image_url", "image_url": path
    or {"url": path}}`, `{"type": "image", "image": path}` and, from the assistant, `{"type": "thinking", "thinking":
    ..}`. An optional system message comes first, then user and assistant alternate and the assistant is last.

    Raises:
        UserError: anything else; begins with `where`.
    """
    if not isinstance(raw, list) or not all(isinstance(m, dict) for m in raw):
        raise UserError(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
    roles = [m.get("role") for m in raw]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise UserError(
            f"{where}: roles {roles} are not an optional system message followed by user and assistant in turn"
        )
    return tuple(Message(m["role"], _parse_content(m["role"], m.get("content"), base, where)) for m in raw)


def _parse_content(role: str, content: Any, base: Path, where: str) -> tuple[Part, ...]:
    chunks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(chunks, list):
        raise UserError(
            f"{where}: content of a message from {role} must be a string or a list of chunks, got {content!r}"
        )
    parts = tuple(_parse_chunk(role, chunk, base, where) for chunk in chunks)
    if not any(part for part in parts):
        raise UserError(f"{where}: message from {role} is empty")
    return parts


def _parse_chunk(role: str, chunk: Any, base: Path, where: str) -> Part:
    kind = chunk.get("type") if isinstance(chunk, dict) else None
    value = chunk.get(kind) if kind is not None else None
    if kind == "image_url" and isinstance(value, dict):
        value = value.get("url")
    if isinstance(value, str):
        if kind == "text":
            return value
        if kind == "thinking" and role == "assistant":
            return Thought(value)
        if kind in ("image", "image_url") and role == "user":
            return image_path(value, base, where)
    raise UserError(
        f"{where}: message from {role} cannot hold {str(chunk)[:80]}; accepted are text, the user's image or "
        "image_url, and the assistant's thinking"
    )


def image_path(value: Any, base: Path, where: str) -> Path:
    """Path of an image named in a row, relative to `base`.

    Raises:
        UserError: not a non-empty string, or a URL that is not a local file.
    """
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: an image must be the path of a file, got {value!r}")
    scheme, separator, rest = value.partition("://")
    if value.startswith("data:") or (separator and scheme != "file"):
        raise UserError(f"{where}: image {value[:60]!r} is not a local file; save it and give its path")
    return base / (rest if separator else value)


def _brackets(role: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    match role:
        case "system":
            return [tokenizer.special("[SYSTEM_PROMPT]")], [tokenizer.special("[/SYSTEM_PROMPT]")]
        case "user":
            return [tokenizer.special("[INST]")], [tokenizer.special("[/INST]")]
        case _:
            return [], [tokenizer.eos]


def _ordered(message: Message) -> list[Part]:
    """Parts in mistral-common's order: neighbouring texts joined, an image that follows only text moved before it."""
    parts: list[Part] = []
    for part in message.parts:
        if part == "":
            continue
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += "\n\n" + part
        else:
            parts.append(part)
    if message.role == "assistant" and len(parts) == 1 and isinstance(parts[0], str):
        return [parts[0].rstrip(" ")]
    if len(parts) == 2 and isinstance(parts[0], str) and isinstance(parts[1], (Path, Image.Image)):
        return [parts[1], parts[0]]
    return parts
