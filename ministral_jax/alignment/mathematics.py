"""Whether an answer is the row's, by text or by mathematics (`math_verify`).

math_verify's own timeouts are alarms, which only the main thread of a process can set and which leave nothing but False
behind: they are off here, and `scoring.Scorer` bounds the time of the process that this runs in.
"""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from ministral_jax.alignment.answer import Sample
from ministral_jax.alignment.rewards import AccuracyReward
from ministral_jax.errors import UserError

_EMPHASIS = re.compile(r"(?<![\w)*_`])(\*{1,3}|__?|`)(?=\S)(.+?)(?<=\S)\1(?![\w(*_`])")
_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_MIXED = re.compile(r"(?<![\w./^])(\d+) (\d+)/(\d+)(?![\w./^])")
_SIGNS = str.maketrans(
    {
        "\u2248": "=",
        "\u2212": "-",
        "\u2013": "-",
        "\u2044": "/",
        "\u00d7": "*",
        "\u00f7": "/",
        "\u221e": r"\infty",
        "\u03c0": r"\pi ",
    }
    | dict.fromkeys("\u00a0\u2009\u202f\u2018\u2019\u201c\u201d", " ")
)
_SUPERSCRIPT = re.compile("(?<=[0-9A-Za-z)])[\u00b2\u00b3\u00b9\u2070-\u207b]+")
_ROOT = re.compile(r"\u221a(?:\(([^()]*)\)|(\d+|[a-z]))")
_TAG = re.compile(r"</?(?:answer|b|strong|i|em|code)>")
_GROUPED = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{3}){2,}(?![\w.])|(?<=\d)(?:\\,|_)(?=\d{3}(?!\d))")
_COMMA = re.compile(r"(?<![\w.,(\[{])(\d+),(\d{1,2})(?![\d.,)\]}])|(?<=\\boxed{)(-?\d+),(\d{1,2})(?=})")
_CHOICE = re.compile(
    r"(?:[Aa]nswer|[Oo]ption|[Cc]hoice|[Cc]hoose|[Pp]ick)(?:\s+is)?[\s:(*$]{1,8}(?:\\text{)?\(?"
    r"([A-Z])(?![\w'])(?!\W+(?:or|and)\b)"
)
_RIGHT = re.compile(r"\b([A-Z])\W{0,3} is (?:the )?(?:correct|right)\b")
_ITEM = re.compile(r"^[\s*_(]*([A-Z])[).:]+(?=[\s*_]|$)", re.MULTILINE)
_OTHER = re.compile(r"\b(?:not|instead of|rather than)\s+\$?[-+]?\d[\d.,/]*|(?<=\d)\s+\([^()\\\d]{2}[^()\\]*\)")
_SAID = re.compile(r"^A(?:ns)?\s*:|(?<=\d)!+(?=\W*$)")
_LISTED = re.compile(r",?\s+(?:and|or)\s+")
_ENVIRONMENT = re.compile(r"\\begin\{(\w+)\}.*?\\end\{\1\}", re.DOTALL)
_POWER_OF_TEN = re.compile(r"(?<![\w.])(\d+\.?\d*)[eE]([+-]?\d+)(?!\w)")
_NUMBER = re.compile(r"[+-]?\d{1,300}(\.\d{1,300})?")
_MARKED = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed|\\begin")
_COMMAND = re.compile(r"\\[a-zA-Z]+|\b(sin|cos|tan|log|ln|exp|sqrt|pi|max|min|oo|inf)\b")
_WORD = re.compile(r"[^\W\d_]{2,}")
_FUNCTION = re.compile(r"(?<!\\)\b(sin|cos|tan|log|ln|exp|pi)\b")
_APART = re.compile(r"\w\s+\w")


def gold_answer(columns: Mapping[str, Any], where: str) -> str:
    """The row's `answer` as stripped text. Raises `UserError`: no such column, or neither text that is not empty nor
    a finite number."""
    gold = columns.get("answer")
    if isinstance(gold, str) and gold.strip():
        return gold.strip()
    if isinstance(gold, int | float) and not isinstance(gold, bool) and math.isfinite(gold):
        return str(gold)
    found = f"answer is {gold!r}" if "answer" in columns else "there is no column answer"
    raise UserError(f"{where}: {found}; the reward accuracy needs text that is not empty or a number there")


def check_gold(columns: Mapping[str, Any], settings: AccuracyReward, where: str) -> None:
    """Raises `UserError`: the row has no answer, or one that is no mathematics where text is not asked for
    (`exact`)."""
    gold = _plain_gold(columns, where)
    if not settings.exact and not _NUMBER.fullmatch(gold):
        _parse_gold(gold, settings, where)


def _plain_gold(columns: Mapping[str, Any], where: str) -> str:
    """The row's answer in the letters of mathematics; (B), B) and B. are the choice B."""
    gold = plain_answer(gold_answer(columns, where))
    choice = re.fullmatch(r"\(?([A-Z])[).]", gold)
    return choice[1] if choice else gold


def plain_answer(text: str) -> str:
    """A stripped answer in the letters of mathematics: without tags and Markdown's emphasis (2**3 is a power), 1e3 as a
    power of ten, 3 1/2 as 7/2, thousands ungrouped, signs, roots, powers and fractions as keyboards have them."""
    text = re.sub(r"(?<!\\)\\ ", " ", _TAG.sub(" ", text)).strip()
    text = _FRACTION.sub(lambda found: " " + unicodedata.normalize("NFKC", found[0]), text).strip()
    text = _SUPERSCRIPT.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    text = _ROOT.sub(lambda found: rf"\sqrt{{{found[1] or found[2]}}}", text).translate(_SIGNS)
    text = _MIXED.sub(lambda found: _improper(*map(int, found.groups())) or found[0], text)
    text = _GROUPED.sub(lambda found: found[0].replace(".", "").strip("\\,_"), text)
    text = _POWER_OF_TEN.sub(r"\1*10^{\2}", text.replace(r"\cdot", "*").replace(r"\times", "*"))
    while (shorter := _EMPHASIS.sub(r"\2", text)) != text:
        text = shorter
    return re.sub(r"\boo\b", r"\\infty", re.sub(r"(?<=[\w)])\*\*(?=[\w(])", "^", text))


def _improper(whole: int, above: int, below: int) -> str | None:
    return f"{whole * below + above}/{below}" if above < below else None


def _decimal(gold: str, answer: str) -> str:
    """An answer to a number, its decimal commas as points: 0,5 is one number, and 1,000 another. Numbers that it is not
    (`72, not 70`), remarks in brackets (`72 (in all)`), `A:` before it and `!` at the end are left out."""
    if not _NUMBER.fullmatch(gold):
        return answer
    answer = _SAID.sub(" ", _OTHER.sub(" ", answer)).strip()
    return _COMMA.sub(lambda found: f"{found[1] or found[3]}.{found[2] or found[4]}", answer)


def _chosen(answer: str) -> str | None:
    """The letter of the choice that an answer says, as in `Answer: (B)`, `B.` or `The answer is B`."""
    alone = re.fullmatch(r"\W*([A-Z])\W*", answer)
    found = [alone[1]] if alone else _CHOICE.findall(answer) or _RIGHT.findall(answer)
    items = set() if found else set(_ITEM.findall(answer))  # of `(B) Paris`, not of a list of the choices
    return found[-1] if found else items.pop() if len(items) == 1 else None


def quick_accuracy(sample: Sample, settings: AccuracyReward) -> float | None:
    """The reward where it needs no mathematics; None elsewhere."""
    gold, answer = _plain_gold(sample.columns, sample.where), plain_answer(sample.answer)
    sure = settings.exact or _NUMBER.fullmatch(gold) is not None
    if sure and (answer == gold or not answer):
        return float(answer == gold)
    if re.fullmatch(r"[+-]?\d{1,300}", gold) and re.fullmatch(r"[+-]?\d{1,300}", answer):
        return float(int(gold) == int(answer))
    return None


def accuracy(sample: Sample, settings: AccuracyReward) -> float:
    r"""1 when the stripped answer is the row's, or its last expression equals it mathematically; else 0.

    The last expression is the last `\boxed{}`, else the last formula or number. An answer without any scores 0, and so
    does one to a plain number that leaves a sum or a product to be worked out (12 + 30 for 42): the question often says
    it already.

    Raises:
        UserError: a row without an answer that can be parsed.
    """
    quick = quick_accuracy(sample, settings)
    if quick is not None:
        return quick
    gold, answer = _plain_gold(sample.columns, sample.where), plain_answer(sample.answer)
    expected, answer = _parse_gold(gold, settings, sample.where), _decimal(gold, answer)
    if answer == gold:
        return 1.0
    if re.fullmatch("[A-Z]", gold) and (chosen := _chosen(answer)):
        return float(chosen == gold)
    if type(expected[0] if expected else None).__name__ == "FiniteSet":
        answer = _LISTED.sub(", ", answer)
    given = _parse(_last_boxed(answer))
    if not expected or not given or (getattr(expected[0], "is_Number", False) and not _is_worked_out(given[0])):
        return 0.0
    from math_verify import verify

    return float(verify(expected, given, timeout_seconds=None))


def _parse_gold(gold: str, settings: AccuracyReward, where: str) -> list[Any]:
    found = _parse(_LISTED.sub(", ", gold))
    if not found and not settings.exact:
        raise UserError(
            f"{where}: answer is {gold!r}, which is no mathematical expression; "
            f"`exact: true` of the reward accuracy compares such answers as text"
        )
    return found


def _parse(text: str) -> list[Any]:
    """The last expression of a text, at most one; text that is one expression without being marked as one is marked."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off
    from math_verify import parse

    options: dict[str, Any] = dict(fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)
    unmarked = _COMMAND.sub(r"\\", text)
    bare = not (_MARKED.search(text) or _WORD.search(unmarked) or _APART.search(unmarked))
    if not re.search(r"\$|\\\[|\\\(|\\boxed", text):
        text = _ENVIRONMENT.sub(r"$\g<0>$", text)
    marked = _FUNCTION.sub(r"\\\1", text)
    return (bare and parse(f"${marked}$", **options)) or parse(text, **options)


def _last_boxed(text: str) -> str:
    r"""The last `\boxed{..}` of a text with its braces matched; all of the text where there is none."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return text
    depth = 0
    for end in range(start + len(r"\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start : end + 1]
    return ""


def _is_worked_out(expression: Any) -> bool:
    """Whether nothing is left to be added or multiplied: 42, 84/2, 2^5 and 4.2 * 10 ^ 1 are, 40 + 2 is not."""
    import sympy

    if isinstance(expression, sympy.Equality):  # 12 + 30 = 42
        return _is_worked_out(expression.rhs)
    if not isinstance(expression, sympy.Basic):
        return True
    if expression.has(sympy.Add):
        return False
    return all(
        len([factor for factor in product.args if factor.is_Number and factor not in (1, -1)]) <= 1
        for product in expression.atoms(sympy.Mul)
    )
