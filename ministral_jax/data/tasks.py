"""Questions made here whose answers can be verified. Every document depends on its number alone, on any machine.

digits: which of scikit-learn's 1797 digits a picture shows. digit-sum: the sum of two of them side by side, the digits
as reasoning. needle: which digit a picture showed that stands somewhere among words, for how far back a model can look.
arithmetic: sums and differences of numbers of up to three digits, products with one digit, worked out from the units
on as reasoning. instructions: short answers of a given form, which `constraints` describe to a reward.
repeat: a word to be said 8 to 30 times, at which a small model does not count well and may not end.
preferences: a right and a wrong answer to a question of arithmetic or instructions, for a judge; some are mislabelled.

A question that comes twice is held out twice or not at all, in preferences too, since documents with the same question
have the same key. So is a picture: the digits are split into groups by a hash of their pixels, both digits of a sum are
of one group, and the groups are what is held out; no digit is in training alone and held out in a sum, or the other way
round. Questions other than needles are short, because every token of the tiny recipe is paid for on a CPU.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ministral_jax import files
from ministral_jax.data import conversation, pairwise
from ministral_jax.data.config import SourceConfig
from ministral_jax.data.conversation import Document, Message, Part, Thought, as_openai, dump
from ministral_jax.data.digests import Digests
from ministral_jax.data.pairwise import judge_documents, pair_document
from ministral_jax.files import stable_key

DEFAULT_LIMIT = 4000
GROUPS = 128
"""Of digits, some 14 each: small ones, so that what is held out is close to the share that is asked for, and large
enough for 27,000 sums."""
DEFAULT_WORDS = 40
"""Around a needle at most: some 110 tokens with the tiny tokenizer."""
NOISE = 10
"""One pair in so many is mislabelled, so that a calibrated judge is not certain of anything."""

# fmt: off
WORDS = (
    "cat", "dog", "sun", "sky", "sea", "tree", "book", "door", "fish", "bird", "milk", "tea", "salt",
    "rain", "snow", "wind", "fire", "road", "hill", "lake", "star", "moon", "ship", "king", "song", "game",
    "hand", "foot", "head", "nose", "gold", "iron", "wood", "leaf", "seed", "corn", "rice", "bean",
)
# fmt: on


def read_task(config: SourceConfig, prompts: bool = False, pairs: bool = False) -> Iterator[Document]:
    """The first `limit` documents of a task; of preferences as many pairs, each in both orders, or as `pairs` once.

    As `prompts` they end with the question; one of preferences has its answers as columns `chosen` and `rejected`.
    """
    for document in _made(config.kind, config.limit or DEFAULT_LIMIT, config.thinking, config.words or DEFAULT_WORDS):
        if config.kind != "preferences":
            yield replace(document, messages=document.messages[:-1]) if prompts else document
        elif prompts:
            yield document
        elif pairs:
            chosen, rejected = ((Message("assistant", (document.columns[key],)),) for key in ("chosen", "rejected"))
            yield pair_document(document, chosen, rejected, math.nan)
        else:
            yield from judge_documents(document, document.columns["chosen"], document.columns["rejected"])


@cache  # they are read to be told apart, packed, asked and examined
def _made(kind: str, limit: int, thinking: bool, words: int) -> tuple[Document, ...]:
    match kind:
        case "digits":
            return tuple(_read_digits(limit))
        case "needle":
            return tuple(_needle(n, words) for n in range(limit))
        case "preferences":
            return tuple(map(_preference, range(limit)))
        case _:
            return tuple(TASKS[kind](n, thinking) for n in range(limit))


def task_digest(config: SourceConfig, digests: Digests) -> str:
    """SHA-256 of what a task's documents are made of; made once as long as what makes them is the same."""
    settings = (config.kind, config.limit, config.thinking, config.words)
    makers = [Path(module.__file__ or "") for module in (sys.modules[__name__], conversation, pairwise, files)]
    return digests.of(f"task {settings} {version('scikit-learn')}", makers, lambda: _digest(*settings))


@cache  # every stage asks again
def _digest(kind: Any, limit: int | None, thinking: bool, words: int | None) -> str:
    digest = hashlib.sha256()
    for document in read_task(SourceConfig(kind=kind, limit=limit, thinking=thinking, words=words)):
        names = (document.name, document.key, document.group)
        digest.update(dump([*names, as_openai(document.messages), document.columns]).encode())
        for part in document.messages[0].parts:
            digest.update(part.tobytes() if isinstance(part, Image.Image) else b"")
    return digest.hexdigest()


def exchange(question: tuple[Part, ...], answer: str, thinking: str | None = None) -> tuple[Message, ...]:
    """A question and its answer, after reasoning if there is any."""
    reasoning = () if thinking is None else (Thought(thinking),)
    return Message("user", question), Message("assistant", (*reasoning, answer))


def _dice(name: str) -> Callable[[int], int]:
    """Draws from 0 to n - 1, one after the other, which a name always gives."""
    throws = count()
    return lambda n: stable_key(f"{name} {next(throws)}") % n


def _arithmetic(n: int, thinking: bool) -> Document:
    dice = _dice(f"arithmetic {n}")
    operator = "++--*"[dice(5)]
    if operator == "*":
        a, b = 2 + dice(98), 2 + dice(8)
        working, answer = _multiply(a, b), str(a * b)
    else:
        digits = (1, 2, 2, 3)[dice(4)]
        a = 10 ** (digits - 1) + dice(9 * 10 ** (digits - 1))
        b = 1 + dice(9 if digits == 1 or dice(3) == 0 else 99)  # three digits twice would be too long
        a, b = (a, b) if operator == "+" else (max(a, b), min(a, b))
        working, answer = (_add(a, b), str(a + b)) if operator == "+" else (_subtract(a, b), str(a - b))
    question = f"{a}{operator}{b}=?"
    messages = exchange((question,), answer, working if thinking else None)
    return _document("arithmetic", n, messages, {"answer": answer}, f"arithmetic {question}")


def _columns(a: int, b: int) -> Iterator[tuple[str, str]]:
    """Digits of both from the units on, empty where there is none."""
    yield from zip_longest(reversed(str(a)), reversed(str(b)), fillvalue="")


def _add(a: int, b: int) -> str:
    """`7+8=15 3+4+1=8` for 37 + 48: the carry comes last, the last step holds all that is left."""
    steps, carry = [], 0
    for x, y in _columns(a, b):
        terms = [term for term in (x, y, "1" * carry) if term]
        total = sum(map(int, terms))
        steps.append("+".join(terms) + (f"={total}" if len(terms) > 1 else ""))
        carry = total // 10
    return " ".join(steps)


def _subtract(a: int, b: int) -> str:
    """`12-7=5 5-3-1=1` for 52 - 37: what was borrowed comes last."""
    steps, borrowed = [], False
    for x, y in _columns(a, b):
        taken = int(y or 0) + borrowed
        top = int(x) + 10 * (int(x) < taken)
        terms = [str(top), *([y] if y else []), *(["1"] if borrowed else [])]
        steps.append("-".join(terms) + (f"={top - taken}" if len(terms) > 1 else ""))
        borrowed = top > 9
    return " ".join(steps)


def _multiply(a: int, b: int) -> str:
    """`7*8=56 3*8+5=29` for 37 * 8."""
    steps, carry = [], 0
    for x in reversed(str(a)):
        total = int(x) * b + carry
        steps.append(f"{x}*{b}" + (f"+{carry}" if carry else "") + f"={total}")
        carry = total // 10
    return " ".join(steps)


def _digit_sum(n: int, thinking: bool) -> Document:
    images, labels, groups = _digits()
    dice = _dice(f"digit-sum {n}")
    left = dice(len(labels))
    mates = np.flatnonzero(groups == groups[left])
    right = mates[dice(len(mates))]
    picture = _picture(np.concatenate([images[left], images[right]], axis=1))
    answer, working = str(labels[left] + labels[right]), f"{labels[left]}+{labels[right]}"
    messages = exchange((picture, "Sum?"), answer, working if thinking else None)
    return replace(_document("digit-sum", n, messages, {"answer": answer}), group=_group(groups[left]))


def _needle(n: int, words: int) -> Document:
    """A digit at any depth of 1 to `words` words; that these are from 2^k to 2^(k+1) is as likely for every k."""
    images, labels, groups = _digits()
    dice = _dice(f"needle {n}")
    shown = dice(len(labels))
    low = 1 << dice(words.bit_length())
    hay = [WORDS[dice(len(WORDS))] for _ in range(low + dice(min(low, words + 1 - low)))]
    depth = dice(len(hay) + 1)
    before, after = " ".join(hay[:depth]), " ".join([*hay[depth:], "Digit?"])
    question = (before, _picture(images[shown]), after) if before else (_picture(images[shown]), after)
    answer = str(labels[shown])
    document = _document("needle", n, exchange(question, answer), {"answer": answer})
    return replace(document, group=_group(groups[shown]))


def _instructions(n: int, _: bool) -> Document:
    return _constrained("instructions", n, *_instruction(n))


def _instruction(n: int) -> tuple[str, str, dict[str, Any]]:
    """Question, answer, and what any answer must satisfy."""
    dice = _dice(f"instructions {n}")
    first = dice(len(WORDS))
    word, other = WORDS[first], WORDS[first - 1 - dice(len(WORDS) - 1)]  # never the same
    times = 2 + dice(4)
    match dice(5):
        case 0:
            question, answer = f"Say {word} {times} times.", " ".join([word] * times)
            constraints = dict(contains=answer, max_words=times)
        case 1:
            question, answer = f"Say {word} in capitals.", word.upper()
            constraints = dict(contains=answer, uppercase=True, max_words=1)
        case 2:
            top = times + dice(5)
            question, answer = f"Count to {top}.", " ".join(map(str, range(1, top + 1)))
            constraints = dict(starts_with="1", contains=answer, ends_with=str(top), max_words=top)
        case 3:
            question, answer = f"Say {word} and {other} on 2 lines.", f"{word}\n{other}"
            constraints = dict(starts_with=word, ends_with=other, lines=2, max_words=2)
        case _:
            question, answer = f"Say {word}, then {other}.", f"{word} {other}"
            constraints = dict(starts_with=word, ends_with=other, lowercase=True, lines=1, max_words=2)
    return question, answer, constraints


def _repeat(n: int, _: bool) -> Document:
    dice = _dice(f"repeat {n}")
    word, times = WORDS[dice(len(WORDS))], 8 + dice(23)
    question, answer = f"Say {word} {times} times.", " ".join([word] * times)
    return _constrained("repeat", n, question, answer, dict(contains=answer, max_words=times))


def _constrained(kind: str, n: int, question: str, answer: str, constraints: dict[str, Any]) -> Document:
    columns = {"constraints": [{"kind": kind, "value": value} for kind, value in constraints.items()], "answer": answer}
    return _document(kind, n, exchange((question,), answer), columns, f"instructions {question}")


def _preference(n: int) -> Document:
    """A question of arithmetic (even n) or instructions (odd n) and two answers, named as they are labelled."""
    task = (_arithmetic, _instructions)[n % 2](n // 2, True)
    dice = _dice(f"preferences {n}")
    right = task.columns["answer"]
    fault = ("wrong", "unfinished", "format", "repetition")[dice(4)]
    wrong = _spoilt(fault, right, task, dice)
    flipped = dice(NOISE) == 0
    chosen, rejected = (wrong, right) if flipped else (right, wrong)
    columns = {"answer": right, "chosen": chosen, "rejected": rejected, "fault": fault, "flipped": flipped}
    return _document("preferences", n, task.messages[:-1], columns, task.key)


def _spoilt(fault: str, right: str, task: Document, dice: Callable[[int], int]) -> str:
    arithmetic = "constraints" not in task.columns
    match fault:
        case "repetition":
            return " ".join([right] * max(8 // len(right.split()), 2))
        case "unfinished" if arithmetic:  # all of the working and no result of its own
            return next(part.text for part in task.messages[-1].parts if isinstance(part, Thought))
        case "unfinished":
            return right.rpartition(" ")[0] or right[:-1]
        case "format" if arithmetic:
            return ("{}?", "={}", "{}+", "[{}")[dice(4)].format(right)
        case "format":
            return right.swapcase() if right.swapcase() != right else right.replace(" ", ",")
        case _ if arithmetic:
            off = (1, 2, 10)[dice(3)]
            return str(int(right) + (off if dice(2) or int(right) < off else -off))
        case _:
            others = (_instruction(dice(10**6))[1] for _ in count())
            return next(other for other in others if other != right)


def _document(kind: str, n: int, messages: tuple[Message, ...], columns: dict[str, Any], key: str = "") -> Document:
    name = f"{kind}-{n:05d}"
    return Document(name, name, messages=messages, columns=columns, key=key)


@cache
def _digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 images `[N, 8, 8]` scaled from 0..16 to 0..255, and labels and groups `[N]`."""
    from sklearn.datasets import load_digits  # a second to import, and only these tasks need it

    found: Any = load_digits(return_X_y=True)  # Any: its types name pandas where that is installed
    pixels, labels = found
    images = (pixels.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    return images, labels, np.array([stable_key(image.tobytes().hex()) % GROUPS for image in images])


def _group(number: int) -> str:
    return f"digits of group {number}"


def _picture(grey: np.ndarray) -> Image.Image:
    return Image.fromarray(np.repeat(grey[:, :, None], 3, axis=2))


def _read_digits(limit: int) -> Iterator[Document]:
    images, labels, groups = _digits()
    names = [f"digit-{n:04d}" for n in range(len(labels))]
    for n in sorted(range(len(names)), key=lambda n: stable_key(names[n]))[:limit]:
        messages = exchange((_picture(images[n]), "Digit?"), str(labels[n]))
        columns = {"answer": str(labels[n])}
        yield Document(names[n], names[n], messages=messages, columns=columns, group=_group(groups[n]))


TASKS: dict[str, Callable[[int, bool], Document]] = {
    "arithmetic": _arithmetic,
    "digit-sum": _digit_sum,
    "instructions": _instructions,
    "repeat": _repeat,
}
KINDS = ("digits", "needle", "preferences", *TASKS)
