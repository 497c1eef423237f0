"""Rewards that are cheap and pure: format, constraints, language, length. `(sample, settings) -> float`."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

from ministral_jax.alignment.answer import Sample
from ministral_jax.alignment.rewards import ConstraintsReward, FormatReward, LanguageReward, LengthReward
from ministral_jax.errors import UserError

SCRIPT_SHARE = 0.9
"""Of the letters of a completion that must be of the prompt's script."""

_TAG = re.compile(r"\[/?THINK\]")
_NOT_PROSE = re.compile(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\[a-zA-Z]+", re.DOTALL)
_ONE_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}


def format_reward(sample: Sample, settings: FormatReward) -> float:
    """1 for `[THINK]reasoning[/THINK]answer`, neither empty, no other such tag, ended by its end of sequence; else 0.

    With `thinking` false: any text that is not empty, has no such tag and ended so.
    """
    if sample.stopped != "stop" or not sample.answer.strip():
        return 0.0
    if not settings.thinking:
        return float(_TAG.search(sample.text) is None)
    inside = sample.thinking or ""
    return float(bool(inside.strip()) and _TAG.search(inside) is None and _TAG.search(sample.answer) is None)


_CONSTRAINTS: dict[str, tuple[type | None, Callable[[str, Any], bool]]] = {
    "max_words": (int, lambda answer, value: 0 < len(answer.split()) <= value),
    "starts_with": (str, lambda answer, value: answer.startswith(value)),
    "ends_with": (str, lambda answer, value: answer.endswith(value)),
    "contains": (str, lambda answer, value: value in answer),
    "lines": (int, lambda answer, value: len([line for line in answer.splitlines() if line.strip()]) == value),
    "uppercase": (None, lambda answer, _: answer.isupper()),
    "lowercase": (None, lambda answer, _: answer.islower()),
}
"""Type of the value (None: needs none) and whether the stripped answer satisfies it; an empty answer satisfies none."""


def check_constraints(constraints: Any, where: str) -> None:
    """Raises `UserError`: not a list of known constraints."""
    if not isinstance(constraints, list):
        raise UserError(f"{where}: column constraints is {constraints!r}, not a list such as [{{'kind': 'uppercase'}}]")
    for constraint in constraints:
        kind = constraint.get("kind") if isinstance(constraint, dict) else None
        if kind not in _CONSTRAINTS:
            raise UserError(f"{where}: constraint {constraint!r} has no kind that is one of {', '.join(_CONSTRAINTS)}")
        wanted, value = _CONSTRAINTS[kind][0], constraint.get("value")
        if wanted is None:
            if value not in (None, True):
                raise UserError(f"{where}: constraint {kind} has the value {value!r}; it takes none, or true")
        elif type(value) is not wanted or not value:
            accepted = {int: "a whole number above 0", str: "a text that is not empty"}[wanted]
            raise UserError(f"{where}: constraint {kind} has the value {value!r}, not {accepted}")


def constraints_reward(sample: Sample, settings: ConstraintsReward) -> float:
    """Share of the row's constraints that the stripped answer satisfies; 1 where there are none."""
    constraints = sample.columns.get("constraints")
    check_constraints(constraints, sample.where)
    assert constraints is not None
    answer = sample.answer.strip()
    kept = [bool(answer) and _CONSTRAINTS[c["kind"]][1](answer, c.get("value")) for c in constraints]
    return sum(kept) / len(kept) if kept else 1.0


@cache
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "UNNAMED").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").split()[0]
    return _ONE_SCRIPT.get(name, name)


def scripts(text: str) -> Counter[str]:
    """Letters of each script, code and formulas left out."""
    return Counter(_script(letter) for letter in _NOT_PROSE.sub(" ", text) if letter.isalpha())


def _prompt_text(sample: Sample) -> str:
    """What the last message of the user says."""
    content = next((message["content"] for message in reversed(sample.prompt) if message["role"] == "user"), "")
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "") for part in content if part.get("type") == "text")


def language_reward(sample: Sample, settings: LanguageReward) -> float:
    """1 when reasoning and answer are each written, to 0.9 of their letters, in the prompt's most frequent script.

    It tells scripts apart (Latin, Cyrillic, Arabic, Han with kana, Hangul, ...), not languages: French after an English
    prompt passes. That is what can be said without a model of languages; it catches a reasoning that wanders off into
    another script. A prompt without letters, or a text without any, has nothing to go by: 1.
    """
    of_prompt = scripts(_prompt_text(sample))
    if not of_prompt:
        return 1.0
    wanted = min(of_prompt, key=lambda script: (-of_prompt[script], script))
    found = [scripts(text) for text in (sample.thinking or "", sample.answer)]
    return float(all(counts[wanted] >= SCRIPT_SHARE * counts.total() for counts in found))


def length_reward(sample: Sample, settings: LengthReward) -> float:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13): 0 up to limit - cache tokens, then down to -1.

    -1 too for a completion that was cut off.
    """
    if settings.cache > sample.limit:
        raise UserError(
            f"length.cache is {settings.cache}, more than the {sample.limit} tokens that a completion may have"
        )
    if sample.stopped == "length":
        return -1.0
    return min(0.0, (sample.limit - settings.cache - len(sample.tokens)) / settings.cache)
