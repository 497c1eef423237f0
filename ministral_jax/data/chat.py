"""Documents and conversations as token ids, with a flag on each token that may be a target.

The format is Tekken v13's (mistral-common): `<s>[SYSTEM_PROMPT]..[/SYSTEM_PROMPT][INST]..[/INST]answer</s>`, no spaces
around control tokens, reasoning as `[THINK]..[/THINK]` before the answer. Tools are offered as
`[AVAILABLE_TOOLS]..[/AVAILABLE_TOOLS]` before the first `[INST]`, called as `[TOOL_CALLS]name[ARGS]{..}` after the
answer, and each answers as `[TOOL_RESULTS]..[/TOOL_RESULTS]`. In v15 the tools are followed by what the file says by
default as `[MODEL_SETTINGS]..[/MODEL_SETTINGS]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from ministral_jax.data.conversation import Document, Message, Part, Thought, dump
from ministral_jax.data.images import image_tokens, open_image, resize, token_grid
from ministral_jax.data.tokenizer import Tokenizer
from ministral_jax.errors import UserError
from ministral_jax.models.spec import VisionSpec

TRAINABLE, ANSWER, TEXT, SECOND = 1, 2, 4, 8
"""Flags of a token: as a target it counts in the loss; it answers after an image, reasoning aside; it is plain text. Or
the second conversation of a pair begins with it."""

_BRACKETS = {
    "system": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "user": ("[INST]", "[/INST]"),
    "tool": ("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    "assistant": (None, "</s>"),
}


@dataclass(frozen=True)
class Rendered:
    """A document: `tokens` uint32 `[N]`, `flags` uint8 `[N]`, and its resized pictures, uint8 `[H, W, 3]`, in order."""

    tokens: np.ndarray
    flags: np.ndarray
    pictures: tuple[np.ndarray, ...] = ()


def render_text(text: str, tokenizer: Tokenizer, where: str) -> Rendered:
    """`<s>text</s>`, every token but the first a target. Raises `UserError`: the text cannot be tokenised; begins with
    `where`."""
    tokens = np.array([tokenizer.bos, *_encode(text, tokenizer, where), tokenizer.eos], np.uint32)
    return Rendered(tokens, np.full(tokens.shape, TRAINABLE | TEXT, np.uint8))


def render_interleaved(
    parts: Sequence[str | Path], tokenizer: Tokenizer, vision: VisionSpec | None, where: str
) -> Rendered:
    """`<s>text image text ..</s>`, every token of the text and the `</s>` a target. Raises `UserError`: the text cannot
    be tokenised, an image cannot be used, or the model has no vision; begins with `where`."""
    tokens, flags, pictures = [tokenizer.bos], [0], list[np.ndarray]()
    for part in parts:
        if isinstance(part, str):
            ids, flag = _encode(part, tokenizer, where), TRAINABLE | TEXT
        else:
            (ids, picture), flag = _shown(part, tokenizer, vision, where), 0
            pictures.append(picture)
        tokens.extend(ids)
        flags.extend([flag] * len(ids))
    tokens.append(tokenizer.eos)
    flags.append(TRAINABLE | TEXT)
    return Rendered(np.array(tokens, np.uint32), np.array(flags, np.uint8), tuple(pictures))


def _shown(
    image: Path | Image.Image, tokenizer: Tokenizer, vision: VisionSpec | None, where: str
) -> tuple[list[int], np.ndarray]:
    """The tokens that stand for an image, and its resized picture."""
    if vision is None:
        raise UserError(f"{where}: has an image but the model has no vision; use a model that has, or drop it")
    image = open_image(image, where) if isinstance(image, PurePath) else image
    return image_tokens(*token_grid(*image.size, vision), tokenizer.image_ids), resize(image, vision)


def _encode(text: str, tokenizer: Tokenizer, where: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except ValueError as error:  # of its regular expression
        raise UserError(f"{where}: cannot be tokenised ({error}); it may have a run of a million blanks") from None


def render(
    messages: tuple[Message, ...],
    tokenizer: Tokenizer,
    vision: VisionSpec | None,
    where: str,
    tools: tuple[dict[str, Any], ...] = (),
) -> Rendered:
    """A conversation as tokens; the assistant's text, reasoning and calls and the `</s>` after them are targets.

    A conversation that ends with the user's or a tool's turn is a prompt: it ends with `[/INST]` or `[/TOOL_RESULTS]`.
    `tools` are those that may be called, as `parse_tools` gives them.

    Raises:
        UserError: an image cannot be used, or the model has no vision; or the tokenizer's file is of a version that
            mistral-common renders in another way; begins with `where`.
    """
    _check_version(tokenizer, messages, tools, where)
    tokens, flags = [tokenizer.bos], [0]
    pictures: list[np.ndarray] = []

    def encode(text: str) -> list[int]:
        return _encode(text, tokenizer, where)

    def add(ids: list[int], flag: int) -> None:
        tokens.extend(ids)
        flags.extend([flag] * len(ids))

    def enclosed(opening: str, ids: list[int], closing: str) -> list[int]:
        return [tokenizer.special(opening), *ids, tokenizer.special(closing)]

    settings = _settings(tokenizer)
    first = enclosed("[AVAILABLE_TOOLS]", encode(dump(tools)), "[/AVAILABLE_TOOLS]") if tools else []
    first += enclosed("[MODEL_SETTINGS]", encode(dump(settings)), "[/MODEL_SETTINGS]") if settings else []
    for message in messages:
        if message.role == "user":
            add(first, 0)
            first = []
        opening, closing = _BRACKETS[message.role]
        trainable = TRAINABLE if message.role == "assistant" and message.target else 0
        add([tokenizer.special(opening)] if opening else [], 0)
        for part in _ordered(message):
            if isinstance(part, str):
                add(encode(part), trainable | ANSWER if trainable and pictures else trainable)
            elif isinstance(part, Thought):
                add(enclosed("[THINK]", encode(part.text), "[/THINK]"), trainable)
            else:
                ids, picture = _shown(part, tokenizer, vision, where)
                pictures.append(picture)
                add(ids, 0)
        for call in message.calls:
            name, arguments = encode(call.name), encode(dump(call.arguments))
            add([tokenizer.special("[TOOL_CALLS]"), *name, tokenizer.special("[ARGS]"), *arguments], trainable)
        add([tokenizer.special(closing)], trainable)
    return Rendered(np.array(tokens, np.uint32), np.array(flags, np.uint8), tuple(pictures))


def render_pair(document: Document, tokenizer: Tokenizer, vision: VisionSpec | None) -> Rendered:
    """Both conversations of a pair one after the other, the second's first token flagged, each with its pictures.

    Answers that a model gave are the tokens that it drew where the row says them, of the same tokenizer: a column
    `tokens` with `tokenizer`, its digest, and `chosen` and `rejected`, ids. Raises `UserError`: see `render`.
    """
    drawn: Any = document.columns.get("tokens")
    is_known = isinstance(drawn, dict) and drawn.get("tokenizer") == tokenizer.digest

    def side(name: str, messages: tuple[Message, ...]) -> Rendered:
        found = render(messages[:-1] if is_known else messages, tokenizer, vision, document.where, document.tools)
        ids = np.array(drawn[name] if is_known else [], np.uint32)
        flags = np.full(len(ids), TRAINABLE, np.uint8)
        return Rendered(np.append(found.tokens, ids), np.append(found.flags, flags), found.pictures)

    first, second = side("chosen", document.messages), side("rejected", document.rejected)
    second.flags[0] = SECOND
    tokens, flags = (np.concatenate(two) for two in ((first.tokens, second.tokens), (first.flags, second.flags)))
    return Rendered(tokens, flags, first.pictures + second.pictures)


def _check_version(
    tokenizer: Tokenizer, messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...], where: str
) -> None:
    """Versions before 13 are the same where there is nothing that changed since; 15 but for what it no longer has, and
    for texts side by side, which it joins in one way within a message and in another between two."""
    if (version := tokenizer.tekken.version.value) == "v13":
        return
    if version == "v15":
        thinks = any(isinstance(part, Thought) for m in messages if m.role == "system" for part in m.parts)
        beside = any(isinstance(a, str) and isinstance(b, str) for m in messages for a, b in pairwise(m.parts))
        if thinks or beside:
            what = "reasoning of the system" if thinks else "texts side by side in one turn"
            raise UserError(f"{where}: {tokenizer.path} is a file of v15; {what} can be rendered as in v13 alone")
        return
    changed = {
        "tools": bool(tools) or any(message.role == "tool" or message.calls for message in messages),
        "reasoning": any(isinstance(part, Thought) for message in messages for part in message.parts),
        "a system message": version == "v3" and any(message.role == "system" for message in messages),
    }
    what = next((name for name, is_there in changed.items() if is_there), "chats")
    if what != "chats" or version not in ("v3", "v7", "v11"):
        raise UserError(f"{where}: {tokenizer.path} is a file of {version}; {what} can be rendered as in v13 alone")


def _settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """Of v15: what mistral-common makes of a request that leaves its settings to the file."""
    builder = tokenizer.tekken.model_settings_builder
    effort = builder.reasoning_effort if builder is not None else None
    return {} if effort is None else {"reasoning_effort": str(effort.default)}


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
    if len(parts) == 2 and isinstance(parts[0], str) and isinstance(parts[1], (PurePath, Image.Image)):
        return [parts[1], parts[0]]
    return parts
