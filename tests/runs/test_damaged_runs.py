"""Runs do no harm: not to what they have begun, not to other runs, and not where a file is damaged."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from reuse_cases import ROWS, lines, run

from ministral_jax.cli import main
from ministral_jax.errors import UserError
from ministral_jax.runs import lock
from ministral_jax.runs.lock import owned, owner
from ministral_jax.runs.survey import saved_step
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


def test_a_stage_that_was_killed_does_not_go_on_with_other_data(moved, capsys):
    words = ["run", str(moved / "recipe.yaml"), "steady", "stages.steady.steps=100000"]
    words += ["stages.steady.checkpoint.every=2", "--run-dir", str(moved / "killed")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-m", "ministral_jax", *words], env=environment, stderr=subprocess.PIPE)
    while (saved_step(moved / "killed" / "steady") or 0) < 4:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    rows = moved / "rows.jsonl"
    before = rows.read_bytes()
    rows.write_bytes(before + b'{"text": "one more"}\n')
    assert main(words) == 2
    assert "was begun with other data: data.sources.web has other content than then" in lines(capsys)
    rows.write_bytes(before)
    assert main([*words, "--dry-run"]) == 0
    assert "goes on from step" in capsys.readouterr().out


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


@pytest.mark.parametrize("text", [None, '{"kind": "eval"}\n{"step": 3}\n{"a": 1}\nnull\n'])
def test_a_child_without_its_evaluations_is_left_out_of_the_family(home, tmp_path, text):
    """As where figures were damaged or removed by hand."""
    recipe = yaml.safe_load((home / "recipe.yaml").read_text())
    recipe["stages"]["short"] = {"do": "distill", "from": "pruned", "teacher": "parent", "steps": 1, "batch": ROWS}
    recipe["stages"]["short"]["evaluate"] = {"rows": 2}
    recipe["family"] = {"parent": "parent", "children": {"half": "short"}}
    (home / "family.yaml").write_text(yaml.safe_dump(recipe))
    words = [
        "run",
        str(home / "family.yaml"),
        "short",
        "--from",
        str(home / "first"),
        "--run-dir",
        str(home / "family"),
    ]
    assert main(words) == 0
    run_dir = shutil.copytree(home / "family", home / tmp_path.name, symlinks=True)
    (run_dir / "short" / "metrics.jsonl").unlink()
    if text is not None:
        (run_dir / "short" / "metrics.jsonl").write_text(text)
    assert main(["report", str(run_dir)]) == 0
    told = json.loads((run_dir / "summary.json").read_text())
    assert told["children"] == {} and "not in its metrics.jsonl" in told["stale"]["half"]


def test_figures_that_do_not_compare_have_no_difference(home, capsys):
    longer = ["parent", "defaults.train.batch.length=48", "--run-dir", str(home / "longer")]
    assert main(["run", str(home / "recipe.yaml"), *longer]) == 0
    capsys.readouterr()
    assert main(["compare", str(home / "first"), str(home / "longer")]) == 0
    said = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row[4] for row in said if row[:2] == ["parent", "cross-entropy"]] == ["rows of 32, 48"]
    assert {row[4] for row in said if row[:1] == ["parent"] and len(row) == 5} == {"rows of 32, 48"}


def test_a_stale_figure_has_no_difference(moved, capsys):
    shutil.copytree(moved / "first", moved / "old", symlinks=True)
    shutil.rmtree(moved / "old" / "parent")
    assert run(moved, "old", "parent") == 0
    capsys.readouterr()
    assert main(["compare", str(moved / "first"), str(moved / "old")]) == 0
    said = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert {row[4] for row in said if row[:1] == ["pruned"] and len(row) == 5} == {"stale"}


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


def test_a_damaged_run_does_not_hide_the_others(moved, capsys, monkeypatch):
    monkeypatch.chdir(moved)
    shutil.copytree("first", "runs/good", symlinks=True)
    Path("runs/bad").mkdir()
    Path("runs/bad/recipe.json").write_text("{")
    assert main(["status"]) == 0
    said = capsys.readouterr().out
    assert "3 of 3 stages" in said and "is not a recipe" in " ".join(said.split())


def test_ctrl_c_while_everything_is_loaded_is_one_line():
    command = [sys.executable, "-m", "ministral_jax", "run", "nowhere.yaml"]
    # a shell's background jobs ignore the signal, and so would what they start
    heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeds)
    assert process.stderr is not None and process.stderr.readline().startswith("ministral-jax ")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=100)[1]
    assert (process.returncode, said) == (130, "ministral-jax: interrupted\n")


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


@pytest.mark.parametrize("full_at", ["begin", "end"])
def test_an_owner_on_a_full_disk_leaves_nothing_to_wait_for(tmp_path, monkeypatch, capsys, full_at):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if full_at == "begin":
            patch.setattr(os, "fsync", full)
            with pytest.raises(UserError, match=r"directory: No space left on device$"), owned(tmp_path):
                pass
        else:
            with owned(tmp_path):
                patch.setattr(os, "fsync", full)
    with owned(tmp_path):
        assert "waiting" not in capsys.readouterr().err


def test_a_run_directory_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "run").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"run is a link to nowhere, which is not there"), owned(tmp_path / "run"):
        pass
