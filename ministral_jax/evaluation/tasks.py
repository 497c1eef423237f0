"""Benchmarks that are made here and need no download: which questions, how they are asked, and what of it is right."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from ministral_jax.alignment.tools import calls_of
from ministral_jax.data.chat import render
from ministral_jax.data.config import SourceConfig
from ministral_jax.data.conversation import Document
from ministral_jax.data.documents import drawn, group_key
from ministral_jax.data.tasks import read_task
from ministral_jax.data.tokenizer import Tokenizer
from ministral_jax.errors import UserError
from ministral_jax.evaluation import questions
from ministral_jax.evaluation.examinee import Continued, Examinee, Manner
from ministral_jax.models.spec import ModelSpec
from ministral_jax.sampling.engine import Prompt, as_prompt
from ministral_jax.settings import Frozen, Place

MADE = 1000
"""Questions from which those are taken that are asked."""
DEFAULT_LIMIT = 200
_TOKENS_PER_WORD = 4
"""Of a haystack, at most, with the smallest vocabulary."""


@dataclass(frozen=True)
class Task:
    """Questions, and how they are asked.

    how: `read` is right where each token of the answer is the most probable one; `choose` where the answer is the most
        probable of the choices; `say` where a greedy answer is the right one, but for case, blanks and a full stop at
        its end; `call` where it makes the one right call. documents: conversations with the answer as a column, for a
        model of a context. trained: whether models may have been trained on questions of the kind, so that those alone
        are asked that a data configuration holds out. label: a part of the questions that is counted by itself.
    """

    how: Literal["read", "choose", "say", "call"]
    documents: Callable[[int], Iterable[Document]]
    trained: bool = False
    shows: bool = False
    label: Callable[[Document], str] | None = None


class QuestionsConfig(Frozen):
    """How questions of tasks that are made here are put, and how many."""

    limit: int | None = Field(default=None, ge=1)
    """Questions of each task at most: 200 if unset, of lm-evaluation-harness all."""
    think: bool = False
    """Whether answers in the chat template begin with reasoning."""
    max_tokens: int = Field(default=256, ge=1)
    """Of an answer, where the task is made here."""


class Asking(QuestionsConfig):
    """How questions are put, and how many: all that a score depends on beside the model and the task."""

    chat: bool = False
    """Whether questions of lm-evaluation-harness are put into the chat template; those made here always are."""
    include: Place | None = None
    """A directory of further tasks for lm-evaluation-harness."""
    unsafe_code: bool = False
    """Whether lm-evaluation-harness may run code that the model wrote, which it does in no sandbox."""


class Question(NamedTuple):
    """A prompt of a task, and the conversation that it is the beginning of."""

    document: Document
    prompt: Prompt


def questions_of(
    name: str, spec: ModelSpec, tokenizer: Tokenizer, held_out: float, asking: QuestionsConfig
) -> tuple[list[Question], int]:
    """What a task of `TASKS` asks a model of these sizes, always the same, and how many questions are left out, since
    they do not fit its context. `held_out`: see `Examinee`.

    Raises:
        UserError: the task shows images and the model has no vision, or no question is left.
    """
    task, found, left_out = TASKS[name], list[Question](), 0
    if task.shows and spec.vision is None:
        raise UserError(f"the task {name} shows images and the model has no vision; choose another task")
    documents = _held_out(task.documents(spec.context), held_out if task.trained else 0)
    for document in islice(documents, asking.limit or DEFAULT_LIMIT):
        rendered = render(document.messages[:-1], tokenizer, spec.vision, document.where, document.tools)
        prompt = as_prompt(rendered, spec.vision)
        if asking.think and task.how in ("say", "call"):
            prompt = prompt._replace(tokens=[*prompt.tokens, tokenizer.special("[THINK]")])
        if len(prompt.tokens) + _ROOM > spec.context:
            left_out += 1
            continue
        found.append(Question(document, prompt))
    if not found:
        raise UserError(f"the task {name} has no question that fits the model's context of {spec.context} tokens")
    return found, left_out


def ask(name: str, examinee: Examinee, asking: QuestionsConfig) -> dict[str, Any]:
    """A model's score at a task of `TASKS`, as JSON: `accuracy` over `count` questions, and by label; of them
    `truncated`, which lost their beginning, and `unfinished`, whose answer was cut short by its length; `left_out`
    questions do not fit the model's context and are not counted. Raises `UserError`: see `questions_of`."""
    return answered(name, examinee, asking)[1]


def answered(name: str, examinee: Examinee, asking: QuestionsConfig) -> tuple[list[bool], dict[str, Any]]:
    """Whether each question of a task is answered right, and the score that `ask` gives."""
    task, spec = TASKS[name], examinee.model.spec
    found, left_out = questions_of(name, spec, examinee.tokenizer, examinee.held_out, asking)
    documents = [one.document for one in found]
    right, told = _ASKED[task.how](examinee, documents, [one.prompt for one in found], asking)
    score = {"accuracy": float(np.mean(right)), "count": len(right), "left_out": left_out}
    return right, score | told | _by(task, documents, right)


_ROOM = 8
"""Tokens for an answer, at least."""
_Asked = tuple[list[bool], dict[str, Any]]


def _held_out(documents: Iterable[Document], share: float) -> Iterable[Document]:
    return (d for d in documents if not share or drawn(np.array([group_key(d)], np.uint64), share)[0])


def _by(task: Task, documents: Sequence[Document], right: Sequence[bool]) -> dict[str, Any]:
    """Counts of each label, in the order of the labels."""
    if task.label is None:
        return {}
    found = defaultdict[str, list[bool]](list)
    for document, one in zip(documents, right, strict=True):
        found[task.label(document)].append(one)
    keys = sorted(found, key=lambda key: ([int(number) for number in re.findall(r"\d+", key)], key))
    return {"by": {key: {"accuracy": float(np.mean(found[key])), "count": len(found[key])} for key in keys}}


def _read(examinee: Examinee, documents: Sequence[Document], prompts: Sequence[Prompt], _: QuestionsConfig) -> _Asked:
    answers = [examinee.tokenizer.encode(document.columns["answer"]) for document in documents]
    found = examinee.likelihoods([Continued(*one) for one in zip(prompts, answers, strict=True)])
    return [one.greedy for one in found], {
        "logprob": float(np.mean([one.logprob for one in found])),
        "truncated": sum(one.truncated for one in found),
    }


def _choose(
    examinee: Examinee, documents: Sequence[Document], prompts: Sequence[Prompt], __: QuestionsConfig
) -> _Asked:
    asked = [
        (n, choice, Continued(prompt, examinee.tokenizer.encode(choice)))
        for n, (document, prompt) in enumerate(zip(documents, prompts, strict=True))
        for choice in document.columns["choices"]
    ]
    best: dict[int, tuple[float, str]] = {}
    for (n, choice, _), found in zip(asked, examinee.likelihoods([one for _, _, one in asked]), strict=True):
        best[n] = max(best.get(n, (-np.inf, "")), (found.logprob, choice))
    return [best[n][1] == document.columns["answer"] for n, document in enumerate(documents)], {}


def _say(
    examinee: Examinee, documents: Sequence[Document], prompts: Sequence[Prompt], asking: QuestionsConfig
) -> _Asked:
    said = examinee.say(prompts, Manner(asking.max_tokens))
    right = [
        _plain(one.answer) == _plain(document.columns["answer"]) for one, document in zip(said, documents, strict=True)
    ]
    return right, _ends(said)


def _call(
    examinee: Examinee, documents: Sequence[Document], prompts: Sequence[Prompt], asking: QuestionsConfig
) -> _Asked:
    said = examinee.say(prompts, Manner(asking.max_tokens))
    made = [[(call.name, call.arguments) for call in calls_of(one.tokens, examinee.tokenizer)] for one in said]
    wanted = [[(document.columns["name"], document.columns["arguments"])] for document in documents]
    return [calls == right for calls, right in zip(made, wanted, strict=True)], _ends(said)


_ASKED: dict[str, Callable[[Examinee, Sequence[Document], Sequence[Prompt], QuestionsConfig], _Asked]] = {
    "read": _read,
    "choose": _choose,
    "say": _say,
    "call": _call,
}


def _ends(said: Sequence[Any]) -> dict[str, int]:
    return {
        "truncated": sum(one.truncated for one in said),
        "unfinished": sum(one.stopped == "length" for one in said),
    }


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").casefold()


def _place(before: int, words: int) -> str:
    """Of a needle: how long the haystack is, in octaves, and how deep it lies, in quarters."""
    octave = 1 << (words.bit_length() - 1)
    quarter = min(4 * before // words, 3)
    return f"{octave} to {2 * octave - 1} words, {25 * quarter} to {25 * quarter + 25} % of them before it"


def _of_picture(document: Document) -> str:
    """Of `data.tasks`' needle: words, a picture, words and the question."""
    *before, _, after = document.messages[0].parts
    depth = sum(len(str(part).split()) for part in before)
    return _place(depth, depth + len(str(after).split()) - 1)


def _made(kind: Any, context: int) -> Iterable[Document]:
    if kind == "needle":
        return read_task(SourceConfig(kind=kind, words=_words(context), limit=MADE))
    return read_task(SourceConfig(kind=kind))


def _words(context: int) -> int:
    """Of the longest haystack for a context."""
    return max(context // _TOKENS_PER_WORD, 1)


TASKS: dict[str, Task] = {
    "arithmetic": Task("say", partial(_made, "arithmetic"), trained=True),
    "digits": Task("read", partial(_made, "digits"), trained=True, shows=True),
    "digit-sum": Task("say", partial(_made, "digit-sum"), trained=True, shows=True),
    "needle": Task("read", partial(_made, "needle"), trained=True, shows=True, label=_of_picture),
    "passkey": Task(
        "say",
        lambda context: questions.passkeys(MADE, _words(context)),
        label=lambda document: _place(document.columns["depth"], document.columns["words"]),
    ),
    "colours": Task("choose", lambda _: questions.colours(MADE), shows=True),
    "shapes": Task("choose", lambda _: questions.shapes(MADE), shows=True),
    "tool-calls": Task("call", lambda _: questions.tool_calls(MADE)),
    "translation": Task(
        "say", lambda _: questions.translations(MADE), label=lambda document: document.columns["language"]
    ),
}
