"""What a reward function and a judge see of a completion. Free of JAX: workers that score samples import this."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

_THINKING = re.compile(r"\s*\[THINK\](.*?)\[/THINK\]", re.DOTALL)


class Sample(NamedTuple):
    """A completion of a prompt.

    prompt: the conversation so far, as OpenAI-style messages; an image is `{"type": "image"}`.
    text: all that was generated, control tokens spelled out, without the `</s>` that ends it.
    thinking: what stands between `[THINK]` and `[/THINK]` at its beginning; None where it does not begin so.
    answer: what follows the thinking; all of the text where there is none.
    tokens: ids, the one that ended it included.
    stopped: by what it ended: its end of sequence or the limit.
    looping: whether it ends in a repetition (`loops.is_looping`).
    columns: the other keys of the prompt's row, such as `answer`.
    where: file and row of the prompt.
    limit: tokens that it was allowed.
    """

    prompt: tuple[dict[str, Any], ...]
    text: str
    thinking: str | None
    answer: str
    tokens: tuple[int, ...]
    stopped: Literal["stop", "length"]
    looping: bool
    columns: dict[str, Any]
    where: str
    limit: int


def split_thinking(text: str) -> tuple[str | None, str]:
    """The reasoning at the beginning of a text, None where there is no complete one, and what follows it."""
    found = _THINKING.match(text)
    return (None, text) if found is None else (found[1], text[found.end() :])
