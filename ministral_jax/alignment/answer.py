"""What a reward function and a judge see of a completion. Free of JAX: workers that score samples import this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple


class Sample(NamedTuple):
    """A completion of a prompt.

    prompt: the conversation so far, as OpenAI-style messages; an image is `{"type": "image"}`.
    text: all that was generated, control tokens spelled out, without the `</s>` that ends it.
    thinking: what stands between the control tokens `[THINK]` and `[/THINK]` at its beginning, or after a `[THINK]`
        that is never closed; None where it does not begin so.
    answer: what follows the thinking; all of the text where there is none. Empty where a `[THINK]` is never closed:
        whatever stands before it, the model had not come to an answer.
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


def split_thinking(
    tokens: Sequence[int], brackets: tuple[int, int] | None
) -> tuple[Sequence[int] | None, Sequence[int]]:
    """The tokens of the reasoning that a completion begins with, None where it begins with none, and those of its
    answer, which there is not where reasoning is never closed. `brackets` are the ids that open and close it: letters
    that spell them are letters."""
    opens, closes = brackets or (None, None)
    if opens not in tokens:
        return None, tokens
    begun, rest = tokens[0] == opens, tokens
    end = tokens.index(closes) if closes in tokens else len(tokens)
    thinking, rest = (tokens[1:end], tokens[end + 1 :]) if begun else (None, tokens)
    is_open = opens in rest and closes not in rest[len(rest) - 1 - rest[::-1].index(opens) :]
    return thinking, () if is_open else rest
