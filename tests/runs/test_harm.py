"""Runs do no harm: not to what they have begun, not to other runs, and not where a file is damaged."""

import json
import os
import shutil

import pytest
from reuse_cases import lines, run

from ministral_jax.cli import main
from ministral_jax.errors import UserError
from ministral_jax.runs import lock
from ministral_jax.runs.lock import owned, owner
from ministral_jax.stages.manifest import digest

pytestmark = pytest.mark.usefixtures("one_device")


# ---- what was begun --------------------------------------------------------------------------------------------------


def test_a_stage_does_not_go_on_from_what_came_of_another_source(moved, capsys):
    first, changed = moved / "first", "stages.pruned.seed=7"
    (first / "hf" / "manifest.json").unlink()  # as after a kill
    begun = json.loads((first / "hf" / "stage.json").read_text())
    assert begun["inputs"] == {"parent": {"stage": "pruned", "digest": digest(first / "pruned")}}
    shutil.rmtree(first / "pruned")
    assert run(moved, "first", changed) == 2
    assert "'hf' in" in (said := lines(capsys)) and "parent 'pruned' than the one that is to be made; delete" in said
    assert run(moved, "first", "pruned", changed) == 0
    assert run(moved, "first", changed) == 2
    assert "was begun from another parent 'pruned' than the one there now; delete" in lines(capsys)
    shutil.rmtree(first / "hf")
    assert run(moved, "first", changed) == 0


def test_what_was_made_from_a_stage_that_is_to_grow_is_not_said_to_be_finished(home, capsys):
    assert run(home, "named", "steady", "steady-hf") == 0
    assert run(home, "named", "steady", "steady-hf", "stages.steady.steps=4") == 2
    assert "was made from 'steady', which is to get more steps; delete" in lines(capsys)
    assert run(home, "named", "steady", "stages.steady.steps=4") == 0
    assert "steady-hf is stale" in lines(capsys)


def test_a_warm_up_that_more_steps_would_stretch_is_no_place_to_go_on_from(home, capsys):
    words = ["steady", "stages.steady.optimizer.warmup=20"]
    assert run(home, "rising", *words) == 0
    assert not (home / "rising" / "steady" / "state").exists()
    assert run(home, "rising", *words, "stages.steady.steps=30") == 2
    assert "its learning rate rose faster than over optimizer.warmup = 20 steps" in lines(capsys)


# ---- other runs ------------------------------------------------------------------------------------------------------


def test_a_stage_of_another_run_is_not_written(home, capsys):
    assert run(home, "giver", "steady") == 0 == run(home, "taker", "steady", "--from", str(home / "giver"))
    before = digest(home / "giver" / "steady")
    assert run(home, "taker", "steady", "stages.steady.steps=4") == 2
    assert "is a link to ../giver/steady, a stage of another run" in lines(capsys)
    assert digest(home / "giver" / "steady") == before
    (home / "giver" / "steady" / "manifest.json").unlink()  # while it is made again there
    assert run(home, "taker", "steady") == 2
    assert "which alone may go on with it; delete the link to make the stage here" in lines(capsys)


def test_a_link_is_replaced_and_not_what_it_leads_to(home):
    for name in ("one", "two"):
        assert run(home, name, "steady") == 0
    assert run(home, "third", "steady", "--from", str(home / "one")) == 0
    shutil.rmtree(home / "one" / "steady")
    (home / "one" / "steady").mkdir()  # where it is about to be made again
    assert run(home, "third", "steady", "--from", str(home / "two")) == 0
    assert os.readlink(home / "third" / "steady") == "../two/steady" and not (home / "one" / "steady").is_symlink()


def test_clean_of_a_sweep_leaves_what_a_run_has_taken(home):
    words = ["sweep", str(home / "recipe.yaml"), "pruned", "--from", str(home / "first"), "--run-dir"]
    words += [str(home / "giving")]
    assert main([*words, "stages.pruned.seed=0,8"]) == 0
    assert run(home, "taking", "pruned", "stages.pruned.seed=8", "--from", str(home / "giving")) == 0
    assert main([*words, "stages.pruned.seed=0,9"]) == 0 == main(["clean", str(home / "giving"), "--delete"])
    assert (home / "taking" / "pruned" / "manifest.json").is_file()
    shutil.rmtree(home / "taking")
    assert main(["clean", str(home / "giving"), "--delete"]) == 0
    assert len([path for path in (home / "giving" / "shared").glob("pruned-*") if not path.is_symlink()]) == 1


def test_a_sweep_names_a_link_to_what_is_gone(home, capsys):
    shutil.copytree(home / "first", home / "leaving", symlinks=True)
    words = ["sweep", str(home / "recipe.yaml"), "pruned", "stages.pruned.seed=0,8"]
    words += ["--run-dir", str(home / "left"), "--from"]
    assert main([*words, str(home / "leaving")]) == 0
    shutil.rmtree(home / "leaving")
    assert main([*words, str(home / "first")]) == 2
    assert "which is gone; delete the link" in lines(capsys)


def test_a_run_that_takes_from_nowhere_makes_no_directory(home, capsys):
    words = ["--from", str(home / "nowhere"), "--run-dir", str(home / "unmade")]
    assert main(["run", str(home / "recipe.yaml"), *words]) == 2
    assert main(["sweep", str(home / "recipe.yaml"), "stages.pruned.seed=0,1", *words]) == 2
    assert lines(capsys).count("is neither a run nor a sweep") == 2 and not (home / "unmade").exists()


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": 3}'])
def test_a_damaged_stage_json_is_named(moved, capsys, text):
    (moved / "first" / "pruned" / "stage.json").write_text(text)
    assert run(moved, "first") == 2
    assert "pruned/stage.json does not say what the stage was begun with; delete" in lines(capsys)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "x"}', '{"name": "x", "stages": {"a": 3}}'])
def test_a_damaged_recipe_json_is_named(tmp_path, capsys, text):
    (tmp_path / "recipe.json").write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path / 'recipe.json'} is not a recipe: " in lines(capsys)


SELF = {"host": "here", "machine": lock._machine(), "pid": 1, "begun": None, "since": "now"}


@pytest.mark.parametrize("said", ["", "{", "[]", "null", '"x"', "3", '{"pid": "a"}', json.dumps({**SELF, "pid": "1"})])
def test_an_owner_that_nobody_can_make_out_is_waited_for(tmp_path, monkeypatch, capsys, said):
    (tmp_path / ".owner").mkdir()
    (tmp_path / ".owner" / "000001").write_text(said)
    monkeypatch.setattr(lock, "SILENT_SECONDS", 0.2)
    assert owner(tmp_path) is None
    with owned(tmp_path):
        assert "000001, which does not say who that is" in capsys.readouterr().err
        assert owner(tmp_path)


def test_a_run_directory_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "run").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"run is a link to nowhere, which is not there"), owned(tmp_path / "run"):
        pass
