"""What an examination leaves for a reader: the prompts with their pictures, and answers before and after."""

from __future__ import annotations

import base64
import io
import itertools
import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from ministral_jax.alignment import examine
from ministral_jax.alignment.answer import Sample
from ministral_jax.alignment.examine import Examiner
from ministral_jax.alignment.passing import pass_at_k
from ministral_jax.alignment.rewards import RewardsConfig
from ministral_jax.alignment.scoring import Scorer, Scores

SCORES = Scores(np.array([0.5, np.nan]), {"accuracy": np.array([1.0, np.nan])}, [])
PIXELS = np.arange(4 * 600 * 3, dtype=np.uint8).reshape(4, 600, 3)


def examiner(directory: Any, monkeypatch: Any, prompts: list[Any]) -> Any:
    """One whose model says what its parameters are, for two of three prompts with pictures before them."""
    rows = [SimpleNamespace(source="a", rendered=SimpleNamespace(pictures=[PIXELS[:, :5], PIXELS])) for _ in prompts]

    def answers(params: str, *_: Any) -> Any:
        asked = [({"role": "user", "content": prompt},) for prompt in prompts]
        said = [Sample(turns, params, None, params, (1, 2), "stop", False, {}, "", 8) for turns in asked]
        return SimpleNamespace(rows=rows, samples=said)

    return made_of(directory, monkeypatch, rows, answers, lambda _: SCORES)


@dataclass
class Model:
    """In the place of a sampler."""

    answers: Any
    temperature: float = 1.0
    at_once: int | None = 4


def made_of(directory: Any, monkeypatch: Any, rows: list[Any], answers: Any, score: Any, completions: int = 0) -> Any:
    made: Any = object.__new__(Examiner)
    made._rows, made._directory = rows, directory
    made._sampler = Model(answers)
    made._scorer = Scorer(TypeAdapter(RewardsConfig).validate_python({"accuracy": {}}), 1)
    made._config = SimpleNamespace(completions=completions, temperature=0.5, max_completion_length=8, answers_at_once=2)
    monkeypatch.setattr(examine, "score_together", lambda _, samples: score(samples))
    return made


def test_prompts_of_every_source_are_kept():
    """However the sources take turns: of each the first prompts, however many are asked."""
    shown = lambda prompts: examine._shown(list(itertools.islice(itertools.cycle("ab"), prompts)))
    assert shown(128) == shown(64) == list(range(12))
    assert shown(3) == [0, 1, 2]
    assert examine._shown([*"aaaaaaaaab", *"abc"]) == [0, 1, 2, 3, 9, 11, 12]


def told(directory: Any) -> Any:
    return json.loads((directory / "answers.json").read_text())


def test_answers_stand_beside_those_of_the_first_evaluation(tmp_path, monkeypatch):
    asked = ["How many?", [{"type": "image"}, {"type": "text", "text": "é?"}]]
    for said in ("first", "second", "third"):
        examiner(tmp_path, monkeypatch, asked).examine(said)
    found = told(tmp_path)
    assert found["prompts"] == 2
    assert [answer["answer"] for answer in found["answers"]] == ["third", "third"]
    assert found["answers"][0]["before"] == {"answer": "first", "reward": 0.5, "parts": {"accuracy": 1.0}}
    assert found["answers"][1]["before"] == {"answer": "first", "reward": None, "parts": {"accuracy": None}}
    examiner(tmp_path, monkeypatch, ["Another?", asked[1]]).examine("fourth")
    first, second = told(tmp_path)["answers"]
    assert "before" not in first and second["before"]["answer"] == "first"  # only to the same prompt


def test_prompts_keep_the_pictures_that_the_model_saw(tmp_path, monkeypatch):
    """Of a conversation's pictures the last belong to its last message; wide ones are made small."""
    examiner(tmp_path, monkeypatch, ["text", [{"type": "text", "text": "Look:"}, {"type": "image"}]]).examine("a")
    text, shown = (json.loads(answer["prompt"]) for answer in told(tmp_path)["answers"])
    assert text == "text" and shown[0] == {"type": "text", "text": "Look:"}
    image = Image.open(io.BytesIO(base64.b64decode(shown[1]["png"])))
    assert image.size == (256, 2)


def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_with_a_right_one():
    rng = np.random.default_rng(0)
    passed = rng.random((9, 10)) < np.linspace(0, 1, 9)[:, None]
    for k in (1, 2, 8, 10):
        want = [np.mean([row[list(chosen)].any() for chosen in itertools.combinations(range(10), k)]) for row in passed]
        np.testing.assert_allclose(pass_at_k(passed, k), want, rtol=1e-12, atol=1e-15)


def test_prompts_are_answered_greedily_and_by_draws(tmp_path, monkeypatch):
    """Two prompts of two sources, as many answers at once as the evaluation says: of the draws 3 and 9 of 12 are right,
    and half of them loop."""
    rows = [SimpleNamespace(source=name, rendered=SimpleNamespace(pictures=[])) for name in "ab"]
    asked = []

    def answering(temperature: float, at_once: int | None) -> Any:
        def answers(params: int, given: Any, seeds: Any, each: int, limit: int) -> Any:
            asked.append((temperature, each, at_once))
            right = [[1.0, 0.0]] if each == 1 else [[n < params, n < 3 * params] for n in range(each)]
            worth = np.array(right, float).T.ravel()
            said = [
                Sample(({"role": "user", "content": "?"},), "", None, str(x), (1,), "stop", n % 2 > 0, {}, "", 8)
                for n, x in enumerate(worth)
            ]
            return SimpleNamespace(rows=[row for row in given for _ in range(each)], samples=said)

        return answers

    monkeypatch.setattr(examine, "replace", lambda _, **change: Model(answering(**change)))

    def score(samples: Any) -> Scores:
        worth = np.array([float(sample.answer) for sample in samples])
        return Scores(worth - 0.25, {"accuracy": worth}, [])

    for params in (3, 4):
        figures, rewards = made_of(tmp_path, monkeypatch, rows, None, score, 12).examine(params)
    assert asked == [(0.0, 1, 2), (0.5, 12, 2)] * 2
    shares = {name: figures[name] for name in ("accuracy", "accuracy_a", "accuracy_b", "pass@1", "pass@1_a")}
    want = {"accuracy": 0.5, "accuracy_a": 1, "accuracy_b": 0, "pass@1": 8 / 12, "pass@1_a": 4 / 12}
    assert shares == pytest.approx(want)
    assert figures["pass@8"] == pytest.approx(1 - 1 / 2 * 1 / 495)  # C(8, 8) / C(12, 8)
    assert figures["reward"] == 0.25 and figures["loop_rate"] == figures["sampled_loop_rate"] == 0.5
    assert rewards.shape == (24,) and rewards.sum() == 16 - 0.25 * 24
    assert figures["sampled_reward"] == pytest.approx(rewards.mean())
    assert len(told(tmp_path)["answers"]) == 2
