"""Tools that an answer may call while it is sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ministral_jax.data.conversation import dump, parse_tool_calls
from ministral_jax.data.tokenizer import Tokenizer
from ministral_jax.distributed.collectives import from_first, is_first


@dataclass(frozen=True)
class ToolBox:
    """A function of a tool's name and its arguments, and how often an answer may use it.

    What it returns is text or JSON. What it raises is told to the model as the result, as a server of tools would. The
    first process of a job calls it for all.
    """

    call: Callable[[str, dict[str, Any]], Any]
    rounds: int

    def results(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """`[TOOL_RESULTS]..[/TOOL_RESULTS]` for every call that an answer ends with; nothing where it makes none."""
        calls = parse_tool_calls(text)
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
