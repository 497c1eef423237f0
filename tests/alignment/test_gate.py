"""What is badly formed or cut off earns nothing and is not graded further (Magistral, arXiv 2506.10910, §2.2)."""

from __future__ import annotations

import numpy as np
import pytest
from paths import ROOT
from pydantic import TypeAdapter
from test_rewards import sample

from ministral_jax.alignment import scoring
from ministral_jax.alignment.rewards import RewardsConfig
from ministral_jax.recipe.load import load_recipe

GIVEN = {"accuracy": {"weight": 0.9}, "format": {"weight": 0.1}, "language": {"weight": 0.1}, "length": {"cache": 8}}
RIGHT = "[THINK]40 and 2[/THINK]42"
BAD = {
    "no thinking": dict(text="42"),
    "unclosed": dict(text="[THINK]42"),
    "cut off": dict(text=RIGHT, stopped="length"),
}


def scores(samples, **given):
    rewards = TypeAdapter(RewardsConfig).validate_python(GIVEN | given)
    with scoring.Scorer(rewards, 1) as scorer:
        found = scorer.score(samples)
        return found, scorer.passed(found)


@pytest.mark.parametrize("name", BAD)
def test_a_badly_formed_or_truncated_answer_earns_nothing(name):
    found, passed = scores([sample(answer="42", **BAD[name]), sample(RIGHT, answer="42")])
    assert found.total.tolist() == [0.0, 1.1] and passed.tolist() == [False, True]
    assert all(values[0] == 0 for values in found.parts.values())


def test_it_is_not_graded_further(monkeypatch):
    graded = []
    monkeypatch.setitem(scoring._FUNCTIONS, "language", lambda sample, _: graded.append(sample.text) or 1.0)
    scores([sample(answer="42", **bad) for bad in BAD.values()] + [sample(RIGHT, answer="42")])
    assert graded == [RIGHT]


def test_without_the_gate_rewards_add():
    found, passed = scores([sample("42", answer="42")], format={"weight": 0.1, "gate": False})
    np.testing.assert_allclose(found.total, [1.0])
    assert found.parts["format"].tolist() == [0.0] and passed.tolist() == [True]


def test_right_is_what_all_rewards_that_say_right_or_wrong_call_right():
    said = [{"kind": "uppercase"}, {"kind": "max_words", "value": 3}]
    judged = [sample("YES", answer="YES", constraints=said), sample("yes", answer="yes", constraints=said)]
    given = {"accuracy": {"exact": True}, "constraints": {}, "format": {"thinking": False}}
    rewards = TypeAdapter(RewardsConfig).validate_python(given)
    with scoring.Scorer(rewards, 1) as scorer:
        assert scorer.passed(scorer.score(judged)).tolist() == [True, False]
    rewards = TypeAdapter(RewardsConfig).validate_python({"format": {}, "language": {}})
    with scoring.Scorer(rewards, 1) as scorer:
        assert scorer.passed(scorer.score(judged)) is None


@pytest.mark.parametrize("recipe", ["tiny", "ministral3"])
def test_reasoning_recipes_have_the_gate_and_ask_what_can_be_answered(recipe):
    stages = load_recipe(ROOT / "configs" / f"{recipe}.yaml").stages
    for name, stage in stages.items():
        if stage.do == "grpo":
            form, evaluated = stage.rewards["format"], stage.evaluate.rewards
            assert form.gate and form.thinking, name
            assert ("accuracy" in evaluated) == ("accuracy" in stage.rewards), (
                name
            )  # of rows without an answer there is none
        if name.endswith("-reasoning"):
            assert stage.evaluate.rewards["format"].thinking, name
