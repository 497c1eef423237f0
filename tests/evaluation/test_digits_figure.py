"""The task of handwritten digits finds what a stage's figure says of the same pictures in packed rows."""

import json
from dataclasses import replace

import numpy as np
import pytest
from examinee_cases import SPEC, examinee
from pydantic import ValidationError
from reuse_cases import write

from ministral_jax.errors import UserError
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.stages import asking, evaluate
from ministral_jax.stages.asking import check_loop_tasks, loop_tasks
from ministral_jax.stages.base import Graph, Job
from ministral_jax.stages.train import Train

pytestmark = pytest.mark.usefixtures("quickly")
DATA = {
    "tokenizer": {"file": "bundled", "vocab": 512, "special": 64},
    "sources": {"digits": {"kind": "digits"}},
    "held_out": 0.1,
    "patches": 256,
}
SCORES = {
    "do": "evaluate",
    "from": "parent",
    "data": DATA,
    "batch": {"sequences": 16, "length": 64},
    "evaluate": {"rows": 999},
    "compute": {"shortest_row": 64},
    "tasks": {"names": ["digits"], "limit": 999},
}
TRAINED = {"do": "train", "model": "tiny-3b", "data": DATA, "compute": {"shortest_row": 64}, "steps": 1}


def test_the_task_of_digits_has_the_figure_of_held_out_rows(tmp_path, monkeypatch):
    one = examinee(tmp_path)
    digits = [one.tokenizer.encode(digit)[0] for digit in "0123456789"]
    one.params["decoder"]["head"] = one.params["decoder"]["head"].at[:, digits].multiply(20)  # it says nothing else
    monkeypatch.setattr(evaluate, "load_stage", lambda *_, **__: (SPEC, one.params))
    monkeypatch.setattr(evaluate, "digest", lambda _: "0")
    stage = evaluate.Evaluate.model_validate(SCORES)
    job = Job("scores", stage, SPEC, Graph({}, {}), tmp_path, one.placement.mesh)
    job.directory.mkdir()
    found = stage.run(job)
    assert found.metrics["task_digits"] == pytest.approx(found.metrics["digit_accuracy"], abs=1e-12)
    assert 0.02 < found.metrics["task_digits"] < 0.4
    assert found.metrics["count_digits"] == found.details["held_out"]["documents"] > 100
    kept = json.loads((job.directory / "tasks" / "digits.json").read_bytes())
    assert kept["result"] == found.details["tasks"]["digits"] and kept["result"]["logprob"] < 0
    assert kept["of"].keys() >= {"checkpoint", "tokenizer", "model", "compute", "held_out", "think", "max_tokens"}
    assert kept["of"]["limit"] == 999 and "batch" not in kept["of"]
    trained = Train.model_validate(TRAINED | {"evaluate": {"tasks": {"names": ["digits"], "limit": 999}}})
    tasks = loop_tasks(replace(job, stage=trained), one.tokenizer, lambda state: state["params"])
    assert np.mean(tasks.ask({"params": one.params})["digits"]) == found.metrics["task_digits"]


def test_a_task_of_pictures_needs_a_model_with_eyes(tmp_path):
    sizes = SPEC.model_copy(update={"vision": None}).model_dump(mode="json")
    parent = {"do": "train", "model": sizes, "steps": 1, "batch": {"sequences": 1, "length": 64}}
    scores = {key: value for key, value in SCORES.items() if key != "data"}
    recipe = {"name": "blind", "data": DATA | {"patches": 0}, "stages": {"parent": parent, "scores": scores}}
    path = write(tmp_path, recipe)
    with pytest.raises(UserError, match=r"stages\.scores\.tasks\.names: digits shows images and the model has no"):
        resolve_specs(load_recipe(path))
    with pytest.raises(UserError, match=r"stages\.parent\.evaluate\.tasks\.names: colours shows images and the model"):
        resolve_specs(load_recipe(path, ["stages.parent.evaluate.tasks.names=[colours]"]))


def test_what_a_loop_cannot_ask_is_refused_by_its_setting(tmp_path):
    with pytest.raises(
        ValidationError, match=r"evaluate\.tasks\.names\n.*'digit' is none of .* \(did you mean digits\?\)"
    ):
        Train.model_validate(TRAINED | {"evaluate": {"tasks": {"names": ["digit"]}}})
    one = examinee(tmp_path)
    stage = Train.model_validate(
        TRAINED | {"evaluate": {"tasks": {"names": ["tool-calls"], "batch": 4}, "patience": 3}}
    )
    job = Job("parent", stage, SPEC, Graph({}, {}), tmp_path, one.placement.mesh)
    with pytest.raises(UserError, match=r"stages\.parent\.evaluate\.tasks\.names: the task tool-calls has no question"):
        check_loop_tasks(job, lambda: one.tokenizer)
    assert stage.making()["evaluate"]["tasks"] == {
        "limit": 100,
        "think": False,
        "max_tokens": 256,
        "names": ["tool-calls"],
    }
    assert "patience" not in stage.making()["evaluate"]


def test_questions_that_lose_their_beginning_are_told_of_once(tmp_path, monkeypatch, capsys):
    one = examinee(tmp_path)
    stage = Train.model_validate(TRAINED | {"evaluate": {"tasks": {"names": ["digits", "passkey"]}}})
    job = Job("parent", stage, SPEC, Graph({}, {}), tmp_path, one.placement.mesh)
    scores = {"digits": {}, "passkey": {"truncated": 1}}
    monkeypatch.setattr(asking, "answered", lambda name, *_: ([True, False], scores[name]))
    tasks = loop_tasks(job, one.tokenizer, lambda state: state)
    assert tasks.ask({}) == tasks.ask({}) == {"digits": [True, False], "passkey": [True, False]}
    assert capsys.readouterr().err.strip() == (
        "parent  1 of 2 questions of passkey lose their beginning: answers may have "
        f"stages.parent.evaluate.tasks.max_tokens = 256 of the context's {SPEC.context}"
    )
