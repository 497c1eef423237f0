"""Tools that an answer may call while it is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ministral_jax.data.conversation import ToolCall, dump, parse_call
from ministral_jax.data.tokenizer import Tokenizer, text_of
from ministral_jax.distributed.collectives import from_first, is_first


def calls_of(tokens: Sequence[int], tokenizer: Tokenizer) -> list[ToolCall]:
    """The calls `[TOOL_CALLS]name[ARGS]{..}` of a completion; none is made in its reasoning, or by letters."""
    calling, naming = tokenizer.special("[TOOL_CALLS]"), tokenizer.special("[ARGS]")
    _, closing = tokenizer.thinking_ids or (-1, -1)
    after = max((n + 1 for n, token in enumerate(tokens) if token == closing), default=0)
    begun = [n for n, token in enumerate(tokens) if token == calling and n >= after]
    calls = []
    for begin, end in pairwise([*begun, len(tokens)]):
        call, spell = list(tokens[begin + 1 : end]), text_of(tokenizer, (tokenizer.eos,))
        cut = call.index(naming) if naming in call else len(call)
        name, arguments = spell(call[:cut], final=True), spell(call[cut + 1 :], final=True)
        calls.append(parse_call(name, arguments if cut < len(call) else None))
    return calls


@dataclass(frozen=True)
class ToolBox:
    """A function of a tool's name and its arguments, and how often an answer may use it.

    What it returns is text or JSON. What it raises is told to the model as the result, as a server of tools would. The
    first process of a job calls it for all.
    """

    call: Callable[[str, dict[str, Any]], Any]
    rounds: int

    def results(self, tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
        """`[TOOL_RESULTS]..[/TOOL_RESULTS]` for every call that an answer ends with; nothing where it makes none."""
        calls = calls_of(tokens, tokenizer)
        if not calls:
            return []
        said = from_first([self._one(call) for call in calls] if is_first() else None)
        brackets = tokenizer.special("[TOOL_RESULTS]"), tokenizer.special("[/TOOL_RESULTS]")
        return [token for result in said for token in (brackets[0], *tokenizer.encode(result), brackets[1])]

    def _one(self, call: Any) -> str:
        if call.problem is not None:
            return f"error: {call.problem}"
        try:
            result = self.call(call.name, call.arguments)
            return result if isinstance(result, str) else dump(result)
        except Exception as error:
            return f"error: {error}"
