"""What an examination leaves for a reader: the prompts with their pictures, and answers before and after."""

from __future__ import annotations

import base64
import io
import itertools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from ministral_jax.alignment import examine
from ministral_jax.alignment.answer import Sample
from ministral_jax.alignment.examine import Examiner
from ministral_jax.alignment.scoring import Scores

PIXELS = np.arange(4 * 600 * 3, dtype=np.uint8).reshape(4, 600, 3)


def examiner(directory: Any, monkeypatch: Any, prompts: list[Any]) -> Any:
    """One whose model says what its parameters are, for two of three prompts with pictures before them."""
    rows = [SimpleNamespace(source="a", rendered=SimpleNamespace(pictures=[PIXELS[:, :5], PIXELS])) for _ in prompts]

    def answers(params: str, *_: Any) -> Any:
        asked = [({"role": "user", "content": prompt},) for prompt in prompts]
        said = [Sample(turns, params, None, params, (1, 2), "stop", False, {}, "", 8) for turns in asked]
        return SimpleNamespace(rows=rows, samples=said)

    made: Any = object.__new__(Examiner)
    made._sampler, made._rows, made._directory, made._scorer = SimpleNamespace(answers=answers), rows, directory, None
    made._config = SimpleNamespace(completions=1, max_completion_length=8)
    scores = Scores(np.array([0.5, np.nan]), {"accuracy": np.array([1.0, np.nan])}, [])
    monkeypatch.setattr(examine, "score_together", lambda *_: scores)
    return made


def test_prompts_of_every_source_are_kept():
    """However the sources take turns: of each the first prompts, however many are asked, and one answer to each."""
    shown = lambda prompts, each=1: examine._shown(list(itertools.islice(itertools.cycle("ab"), prompts)), each)
    assert shown(128) == shown(64) == list(range(12))
    assert shown(64, 4) == list(range(0, 48, 4)) and shown(3) == [0, 1, 2]
    assert examine._shown([*"aaaaaaaaab", *"abc"], 1) == [0, 1, 2, 3, 9, 11, 12]


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
