"""What a reward function and a judge see of a completion. Free of JAX: workers that score samples import this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple


class Sample(NamedTuple):
    """A completion of a prompt.

    prompt: the conversation so far, as OpenAI-style messages; an image is `{"type": "image"}`.
    text: all that was generated, control tokens spelled out, without the `</s>` that ends it.
    thinking: what stands between the control tokens `[THINK]` and `[/THINK]` at its beginning; None where it does not
        begin so.
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


def split_thinking(
    tokens: Sequence[int], brackets: tuple[int, int] | None
) -> tuple[Sequence[int] | None, Sequence[int]]:
    """The tokens of the reasoning that a completion begins with, None where there is no complete one, and those that
    follow it. `brackets` are the ids that open and close it: letters that spell them are letters."""
    if brackets is None or not tokens or tokens[0] != brackets[0] or brackets[1] not in tokens:
        return None, tokens
    end = tokens.index(brackets[1])
    return tokens[1:end], tokens[end + 1 :]
