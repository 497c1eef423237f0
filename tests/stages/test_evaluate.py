"""A model is evaluated at the sizes that the stage says, as one that is trained there is before its first step."""

import json

import pytest
from reuse_cases import CACHE, MODEL, write

from ministral_jax.cli import main
from ministral_jax.errors import UserError
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.stages.manifest import finished

FURTHER = {"from": "parent", "batch": {"sequences": 8, "length": 64}}
STRETCHED = {"context": 64, "rope": {"yarn_factor": 2, "original_context": 32, "temperature_beta": 0.1}}
RARELY = {"every": 99, "early": False, "rows": 4}
RECIPE = {
    "name": "stretched",
    "data": {
        "tokenizer": {"file": "bundled", "vocab": 512, "special": 64},
        "sources": {"code": {"kind": "python-library", "limit": 24}},
        "held_out": 0.3,
    },
    "stages": {
        "parent": {
            "do": "train",
            "model": MODEL | {"context": 32},
            "batch": {"sequences": 8, "length": 32},
            "steps": 3,
            "evaluate": RARELY,
        },
        "before": {"do": "evaluate", **FURTHER, "model": STRETCHED, "evaluate": {"rows": 4}},
        "long": {
            "do": "distill",
            **FURTHER,
            "teacher": "parent",
            "beyond_teacher": "labels",
            "model": STRETCHED,
            "evaluate": RARELY | {"tasks": {"names": ["arithmetic"], "limit": 3, "max_tokens": 2, "batch": 4}},
            "steps": 1,
        },
    },
}


def test_another_context_is_that_of_a_stage_that_trains_there(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "xla").symlink_to(CACHE)
    assert main(["run", str(write(tmp_path, RECIPE)), "--run-dir", str(tmp_path / "run")]) == 0
    manifest = finished(tmp_path / "run" / "before")
    record = json.loads((tmp_path / "run" / "long" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["kind"] == "eval" and record["step"] == 0
    assert manifest.metrics == {key: record[key] for key in manifest.metrics} and manifest.metrics["ce"] > 1
    assert manifest.spec == finished(tmp_path / "run" / "long").spec and manifest.spec.rope.yarn_factor == 2
    assert [octave.start for octave in manifest.held_out.positions] == [0, 32]
    assert record["count_arithmetic"] == finished(tmp_path / "run" / "long").metrics["count_arithmetic"] == 3
    said = capsys.readouterr()
    assert "tasks: arithmetic " in said.err and "arithmetic " in said.out


def test_sizes_other_than_the_context_are_those_of_the_weights(tmp_path):
    path = write(tmp_path, RECIPE)
    with pytest.raises(UserError, match=r"stages\.before\.model\.width = 24 differs from the 16 of its source"):
        resolve_specs(load_recipe(path, ["stages.before.model.width=24"]))
    with pytest.raises(UserError, match=r"stages\.before\.batch\.length = 64 exceeds the model's context of 32"):
        resolve_specs(load_recipe(path, ["stages.before.model=null"]))
