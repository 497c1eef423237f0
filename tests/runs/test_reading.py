"""A run directory as values, in whatever state it is."""

import json
import shutil

import pytest
from report_run import CHILDREN, POST, recipe, told_by, write_json, write_run, write_stage

from ministral_jax.errors import UserError
from ministral_jax.runs.reading import read_run


def test_torn_and_repeated_lines(tmp_path):
    run = write_run(tmp_path / "run", "14b-pruned")
    before = read_run(run).stages["parent"]
    with (run / "parent" / "metrics.jsonl").open("ab") as file:
        again = {"kind": "train", "step": 300, "tokens": 614400, "loss": 1.25}
        file.write(json.dumps(again).encode() + b'\n[1]\nnull\n{"kind": "eval", "step": 700, "tok\xc3')
    after = read_run(run).stages["parent"]
    assert len(after.train) == len(before.train) == 300 and after.train[-1]["loss"] == 1.25
    assert after.evals == before.evals and after.last("ce") == told_by(run, "parent")["metrics"]["ce"]


def test_what_a_killed_stage_leaves_behind(tmp_path):
    run = write_run(tmp_path / "run", "14b-short", more=POST)
    write_stage(run / "14b-short", "14b-short", recipe()["stages"]["14b-short"])
    (run / "14b-short" / "manifest.json").unlink()
    (run / "14b-pruned" / "manifest.json").write_text('{"status": "fini')
    found = read_run(run)
    states = {name: found.stages[name].state for name in ("parent", "14b-pruned", "14b-short", "14b-base")}
    assert list(states.values()) == ["finished", "unfinished", "unfinished", "waiting"]
    short = found.stages["14b-short"]
    assert short.last("kl") == short.evals[-1]["kl"] and short.seen("step") == 300 and short.spec is None
    assert found.notes == ["14b-pruned/manifest.json could not be read and is left out."]
    assert found.member_of()["14b-rl"] == found.member_of()["14b-short"] == "14b"


def test_the_family_is_known_before_there_is_a_summary(tmp_path):
    run = write_run(tmp_path / "run")
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "summary.json").unlink()
    found, told = read_run(tmp_path / "copy"), read_run(run)
    assert [m.name for m in found.members] == [m.name for m in told.members] == ["parent", *CHILDREN]
    for mine, theirs in zip(found.members, told.members, strict=True):
        assert mine.spec == theirs.spec and mine.stages == theirs.stages and mine.published is None
    write_json(tmp_path / "copy" / "recipe.json", {**recipe(), "family": None})
    sizes = [member.name for member in read_run(tmp_path / "copy").members]
    assert sizes == ["parent", "14b-pruned", "8b-pruned", "3b-pruned"]


def test_what_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not a run: it has no recipe\.json"):
        read_run(tmp_path)
    for content in ("{", "[]", '{"stages": []}'):
        (tmp_path / "recipe.json").write_text(content)
        with pytest.raises(UserError, match="is not a recipe"):
            read_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]
