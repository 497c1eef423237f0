"""Tasks that are made here, asked of one who knows the answers, and what becomes of results that were interrupted."""

import json
import sys
from itertools import islice
from types import SimpleNamespace

import pytest
from examinee_cases import tokenizer
from model_cases import VISION

from ministral_jax.errors import UserError
from ministral_jax.evaluation import results
from ministral_jax.evaluation.examinee import Likelihood, Said
from ministral_jax.evaluation.results import Kept, evaluate
from ministral_jax.evaluation.suites import SUITES, Asked, Setting, asked_for
from ministral_jax.evaluation.tasks import TASKS, Asking, ask

COUNT = 12


class Knowing:
    """Answers every question but the first."""

    def __init__(self, tokens, task, vision=VISION, context=4096):
        self.tokenizer, self.held_out = tokens, 0.0
        self.model = SimpleNamespace(spec=SimpleNamespace(vision=vision, context=context))
        self._documents = [*islice(task.documents(context), COUNT)]

    def likelihoods(self, requests):
        each = len(requests) // COUNT
        texts = [self.tokenizer.decode(request.tokens) for request in requests]
        right = [text == self._documents[n // each].columns["answer"] for n, text in enumerate(texts)]
        right[:each] = [not one for one in right[:each]]
        return [Likelihood(-1.0 + one, one, False) for one in right]

    def say(self, prompts, manner):
        return [self._said(n, document) for n, document in enumerate(self._documents)]

    def _said(self, n, document):
        text, tokens = f" {document.columns['answer'].upper()}. ", []
        if "arguments" in document.columns:
            call = json.dumps(document.columns["arguments"] if n else {})
            parts = self.tokenizer.encode(document.columns["name"]), self.tokenizer.encode(call)
            tokens = [self.tokenizer.special("[TOOL_CALLS]"), *parts[0], self.tokenizer.special("[ARGS]"), *parts[1]]
        return Said(text if n else "no", None, tuple(tokens), "stop" if n else "length", n == 1)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokens"))


@pytest.mark.parametrize("name", TASKS)
def test_right_answers_are_counted(tokens, name):
    task = TASKS[name]
    found = ask(name, Knowing(tokens, task), Asking(limit=COUNT))
    assert found["count"] == COUNT and found["left_out"] == 0
    assert found["accuracy"] == pytest.approx((COUNT - 1) / COUNT)
    if task.how in ("say", "call"):
        assert (found["truncated"], found["unfinished"]) == (1, 1)
    if task.label is not None:
        assert sum(part["count"] for part in found["by"].values()) == COUNT and len(found["by"]) > 2


def test_what_cannot_be_asked_says_why(tokens):
    with pytest.raises(UserError, match="digits shows images and the model has no vision"):
        ask("digits", Knowing(tokens, TASKS["digits"], vision=None), Asking())
    with pytest.raises(UserError, match="tool-calls has no question that fits the model's context of 64 tokens"):
        ask("tool-calls", Knowing(tokens, TASKS["tool-calls"], context=64), Asking(limit=3))


def test_only_questions_that_were_held_out_are_asked(tokens, monkeypatch):
    asked = []
    one = Knowing(tokens, TASKS["arithmetic"])
    monkeypatch.setattr(
        one, "say", lambda prompts, manner: asked.extend(prompts) or [Said("", None, (), "stop", False)]
    )
    one.held_out = 1e-3
    assert ask("arithmetic", one, Asking(limit=1))["count"] == 1
    one.held_out = 0
    ask("arithmetic", one, Asking(limit=1))
    assert asked[0].tokens != asked[1].tokens


def test_what_was_interrupted_goes_on_with_the_next_task(tmp_path, monkeypatch):
    asked, stop = [], ["needle"]

    def answer(name, *_):
        asked.append(name)
        if name in stop:
            raise KeyboardInterrupt
        return {"accuracy": 0.5, "count": 2}

    monkeypatch.setattr(results, "ask", answer)
    tasks = asked_for(["digits", "needle", "passkey"])[0]
    kept = Kept(tmp_path / "scores", {"checkpoint": "a", "limit": None})
    with pytest.raises(KeyboardInterrupt):
        evaluate(tasks, None, Asking(), kept)
    stop.clear()
    found = evaluate(tasks, None, Asking(), kept)
    assert asked == ["digits", "needle", "needle", "passkey"]
    assert found == {name: {"accuracy": 0.5, "count": 2} for name in ("digits", "needle", "passkey")}
    assert evaluate(tasks, None, Asking(), kept) == found and len(asked) == 4
    with pytest.raises(UserError, match=r"digits\.json was found with checkpoint = 'a', not 'b'; choose another"):
        evaluate(tasks, None, Asking(), Kept(kept.directory, {"checkpoint": "b", "limit": None}))
    (tmp_path / "scores" / "digits.json").write_text("{")
    with pytest.raises(UserError, match=r"digits\.json is not a result of this program"):
        evaluate(tasks, None, Asking(), kept)


def test_names_of_tasks():
    assert asked_for(["digits", "mmlu@5", "digits"]) == ([Asked("digits"), Asked("mmlu", 5)], [])
    tasks, lacking = asked_for(["paper-base", "mmlu@5"])
    assert Asked("minerva_math", 2) in tasks and len(tasks) == len(SUITES["paper-base"]) - 1
    assert lacking == ["MathVista"]
    with pytest.raises(UserError, match="--tasks mmlu@few: after @ stands the number of examples, such as mmlu@5"):
        asked_for(["mmlu@few"])
    with pytest.raises(UserError, match="--tasks digits@3: a task that is made here has no examples"):
        asked_for(["digits@3"])
    with pytest.raises(UserError, match=r"stages\.scores\.tasks\.names: digits@3: a task that is made here has no"):
        asked_for(["digits@3"], Setting.of("stages.scores.tasks"))


def test_a_task_of_the_harness_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"--tasks mmlu@5: is none of arithmetic, .*pip install -e '\.\[eval\]'"):
        evaluate([Asked("mmlu", 5)], None, Asking())
