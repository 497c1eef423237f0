"""What a result is made of is its content: results are reused, sources may move, stages get more steps."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from reuse_cases import BASELINE, CACHE, RECIPE, ROWS, lines, run, write

import ministral_jax
from ministral_jax.cli import main
from ministral_jax.interop.hf import export_hf
from ministral_jax.models.vlm import init_params
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.stages.base import load_stage
from ministral_jax.stages.manifest import finished

pytestmark = pytest.mark.usefixtures("one_device")


# ---- another value costs one stage -----------------------------------------------------------------------------------


def test_one_stage_with_another_value_is_the_only_one_that_is_made(home, capsys):
    assert run(home, "other", "pruned", "stages.pruned.seed=3", "--from", str(home / "first")) == 0
    captured = capsys.readouterr()
    assert "1 of 2 stages to make, 1 taken" in captured.err and "] parent: taken from" in captured.err
    assert (home / "other" / "parent").is_symlink() and not (home / "other" / "pruned").is_symlink()
    assert not os.path.isabs(os.readlink(home / "other" / "parent"))
    assert [line.split("│")[1].strip() for line in captured.out.splitlines() if "finished" in line] == [
        "parent",
        "pruned",
    ]
    assert run(home, "other", "pruned", "stages.pruned.seed=3") == 0  # which is its own run by now
    assert "2 finished" in lines(capsys)


def test_a_sweep_takes_what_a_run_has_made_and_a_run_what_a_sweep_has(home, capsys):
    words = ["pruned", "stages.pruned.seed=0,4"]
    sweep = [
        "sweep",
        str(home / "recipe.yaml"),
        *words,
        "--run-dir",
        str(home / "swept"),
        "--from",
        str(home / "first"),
    ]
    assert main(sweep) == 0
    shared = {path.name: path.is_symlink() for path in (home / "swept" / "shared").glob("p*")}
    assert sorted(shared.values()) == [False, True, True]  # parent and one of the two were there
    assert run(home, "back", "pruned", "stages.pruned.seed=4", "--from", str(home / "swept")) == 0
    assert "0 of 2 stages to make, 2 taken" in lines(capsys)
    assert main(sweep) == 0


def test_what_another_run_has_made_of_other_things_is_not_taken(home, capsys):
    assert run(home, "unlike", "pruned", "stages.parent.steps=2", "--from", str(home / "first")) == 0
    assert "2 of 2 stages to make; " in lines(capsys)
    assert run(home, "nowhere", "parent", "--from", str(home / "swept2")) == 2
    assert "is neither a run nor a sweep" in lines(capsys)


def test_a_link_to_a_run_that_is_gone_is_named(home, capsys):
    (home / "broken").mkdir()
    (home / "broken" / "parent").symlink_to("../gone/parent")
    assert run(home, "broken", "parent") == 2
    assert "is a link to ../gone/parent, which is gone" in lines(capsys)


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(home, capsys):
    words = ["stages.hf.dtype=bfloat16", "--from", str(home / "first"), "--dry-run"]
    assert main(["run", str(home / "recipe.yaml"), *words, "--run-dir", str(home / "dry")]) == 0
    said = capsys.readouterr().out
    assert said.count("taken from") == 2 and "is made" in said and not (home / "dry").exists()


def test_status_of_a_run_and_of_all_runs(home, capsys, monkeypatch):
    assert main(["status", str(home / "first")]) == 0
    said = capsys.readouterr().out
    assert said.count("finished") == 3 and "optional and not run: steady, steady-hf, decayed" in said
    assert "written by: nobody now" in said
    monkeypatch.chdir(home)
    Path("runs").mkdir()
    Path("runs/one").symlink_to("../first")
    assert main(["status"]) == 0
    assert "3 of 3 stages" in capsys.readouterr().out
    assert main(["status", str(home)]) == 2
    assert "is not a run" in lines(capsys)


def test_two_runs_are_compared(home, capsys):
    assert run(home, "other", "pruned", "stages.pruned.seed=3", "--from", str(home / "first")) == 0
    capsys.readouterr()
    assert main(["compare", str(home / "first"), str(home / "other")]) == 0
    said = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["pruned", "seed", "0", "3"] in said
    (row,) = [row for row in said if row[:2] == ["parent", "cross-entropy"]]
    assert row[2] == row[3] and float(row[4]) == 0


def test_clean_lists_what_no_result_needs_and_removes_it_when_told_to(moved, capsys):
    run_dir = moved / "first"
    (run_dir / "data" / ".draft-abc").mkdir()
    assert main(["clean", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert "compiled programs" in said and ".draft-abc" in said and "data/documents" in said
    assert "nothing was removed" in said and (run_dir / "data" / "documents").is_dir()
    assert main(["clean", str(run_dir), "--delete"]) == 0
    assert not (run_dir / "xla").exists() and not (run_dir / "data" / "documents").exists() and CACHE.is_dir()
    assert run(moved, "first") == 0 and main(["export", str(run_dir / "pruned"), str(moved / "again")]) == 0


def test_clean_of_a_sweep_removes_stages_that_no_point_uses(home, capsys):
    words = ["sweep", str(home / "recipe.yaml"), "pruned", "--from", str(home / "first")]
    words += ["--run-dir", str(home / "cleaned")]
    assert main([*words, "stages.pruned.seed=0,5"]) == 0 == main([*words, "stages.pruned.seed=5,6"])
    capsys.readouterr()
    shared = home / "cleaned" / "shared"
    before = {path.name for path in shared.glob("p*")}
    assert main(["clean", str(home / "cleaned"), "--delete"]) == 0
    gone = before - {path.name for path in shared.glob("p*")}
    assert len(gone) == 1 and gone.pop().startswith("pruned-") and (home / "first" / "pruned" / "params").is_dir()


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"ministral-jax {ministral_jax.__version__}\n"


# ---- content ---------------------------------------------------------------------------------------------------------


def test_a_moved_recipe_with_its_data_and_its_run_goes_on(moved, capsys):
    assert run(moved, "first") == 0
    assert "0 of 3 stages to make, 3 finished" in lines(capsys)


def test_the_same_content_under_another_name_is_the_same(moved, capsys, monkeypatch):
    (moved / "rows.jsonl").rename(moved / "others.jsonl")
    (moved / "tekken.json").rename(moved / "tokenizer.json")
    monkeypatch.chdir(moved)  # paths that are typed are relative to the working directory
    words = ["data.sources.web.path=others.jsonl", "data.tokenizer.file=./tokenizer.json"]
    assert run(moved, "first", *words) == 0
    assert "3 finished" in lines(capsys)


def test_sources_that_are_gone_do_not_disturb_what_is_finished(moved, capsys):
    (moved / "rows.jsonl").unlink()
    (moved / "tekken.json").unlink()
    assert run(moved, "first") == 0
    assert "3 finished" in lines(capsys)
    assert main(["export", str(moved / "first" / "pruned"), str(moved / "exported")]) == 0
    assert (moved / "exported" / "tekken.json").is_file()
    assert run(moved, "first", "steady") == 2
    assert "tekken.json' is not a file" in lines(capsys)


@pytest.mark.parametrize(
    ("file", "setting"), [("rows.jsonl", "data.sources.web"), ("tekken.json", "data.tokenizer")], ids=["rows", "tekken"]
)
def test_content_that_changed_is_noticed(moved, capsys, file, setting):
    path = moved / file
    if file == "rows.jsonl":
        path.write_text(path.read_text() + '{"text": "one more"}\n')
    else:
        tekken = json.loads(path.read_text())
        tekken["vocab"][300], tekken["vocab"][301] = (
            {**tekken["vocab"][301], "rank": 300},
            {**tekken["vocab"][300], "rank": 301},
        )
        path.write_text(json.dumps(tekken))
    assert run(moved, "first") == 2
    assert f"was begun with other data: {setting} has other content than then" in lines(capsys)


def test_content_that_changed_is_noticed_by_a_stage_that_was_interrupted(moved, capsys):
    (moved / "first" / "pruned" / "manifest.json").unlink()  # as after a kill
    (moved / "rows.jsonl").write_text((moved / "rows.jsonl").read_text() + '{"text": "one more"}\n')
    assert run(moved, "first", "pruned") == 2
    assert "was begun with other data: data.sources.web has other content than then" in lines(capsys)


def test_a_stage_that_made_nothing_takes_other_settings(home, capsys):
    assert run(home, "failed", "parent", "stages.parent.optimizer.lr=1e30", "stages.parent.steps=2") == 2
    capsys.readouterr()
    assert run(home, "failed", "parent", "stages.parent.steps=2") == 0


# ---- more steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "few", "many", "saved"), [("steady", 3, 6, 3), ("decayed", 5, 8, 4)])
def test_more_steps_go_on_to_what_one_run_of_them_would_be(home, capsys, stage, few, many, saved):
    assert run(home, "grown", stage, f"stages.{stage}.steps={few}") == 0
    assert run(home, "grown", stage, f"stages.{stage}.steps={many}") == 0
    said = lines(capsys)
    assert f"{stage}: train, goes on from step {saved}" in said
    assert run(home, "whole", stage, f"stages.{stage}.steps={many}") == 0
    grown, whole = (load_stage(home / name / stage)[1] for name in ("grown", "whole"))
    assert jax.tree.all(jax.tree.map(np.array_equal, grown, whole))
    assert finished(home / "grown" / stage).metrics == finished(home / "whole" / stage).metrics
    assert finished(home / "grown" / stage).steps == many


def test_a_stage_that_cannot_have_more_steps_says_why(home, moved, capsys):
    assert run(home, "first", "parent", "stages.parent.steps=9") == 2
    assert "cannot go on from its 3 steps: its learning rate has decayed over them" in lines(capsys)
    assert run(moved, "grow", "steady", "steady-hf") == 0
    assert run(moved, "grow", "steady-hf", "stages.steady.steps=4") == 2
    assert "'steady-hf' in" in (said := lines(capsys)) and "was made from 'steady', which is to get more steps" in said
    shutil.rmtree(moved / "grow" / "steady" / "state")
    assert run(moved, "grow", "steady", "stages.steady.steps=4") == 2
    assert "no state of its optimiser is in" in lines(capsys)


# ---- an imported parent ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(home) -> Path:
    spec = resolve_specs(load_recipe(home / "recipe.yaml"), ["parent"])["parent"]
    export_hf(init_params(spec, jax.random.key(0)), spec, home / "model", "float32", [])
    recipe = {
        **RECIPE,
        "stages": {
            "parent": {"do": "import", "path": "model"},
            "pruned": {"do": "prune", "from": "parent", "model": {"mlp_width": 16}, "batch": ROWS, "calibration": 1},
            "short": {"do": "distill", "from": "pruned", "teacher": "parent", "steps": 1, "batch": ROWS, **BASELINE},
            "absent": {"do": "import", "path": "nowhere", "optional": True},
        },
        "family": {"parent": "parent", "children": {"half": "short"}},
    }
    there = home / "imported"
    there.mkdir()
    for name in ("rows.jsonl", "tekken.json"):
        shutil.copy(home / name, there / name)
    (home / "model").rename(there / "model")
    write(there, recipe)
    assert run(there, "run") == 0
    return there


def test_an_imported_parent_is_evaluated_once_like_a_trained_one(imported, capsys):
    summary = json.loads((imported / "run" / "summary.json").read_text())
    parent, child = summary["parent"], summary["children"]["half"]
    assert parent["bits_per_byte"] == finished(imported / "run" / "parent-evaluated").metrics["bits_per_byte"] > 0
    assert parent["row_length"] == child["row_length"] == ROWS["length"]
    assert run(imported, "run") == 0
    captured = capsys.readouterr()
    assert "5 finished" in captured.err
    rows = [line for line in captured.out.splitlines() if line.startswith("│ parent ")]
    assert f" {parent['bits_per_byte']:.3f} " in rows[-1]


def test_a_run_of_which_a_stage_was_deleted_is_reported_without_what_came_of_it(imported, tmp_path, capsys):
    there = shutil.copytree(imported / "run", tmp_path / "run", symlinks=True)
    shutil.rmtree(there / "pruned")
    assert main(["report", str(there)]) == 0
    summary = json.loads((there / "summary.json").read_text())
    assert summary["children"] == {} and summary["stale"] == {"half": "made from pruned, which is not there"}
    assert run(imported, "run", "--all", "short") == 2
    assert "--all runs every stage, short too" in lines(capsys)


def test_a_checkpoint_that_is_gone_after_its_import_is_not_missed(imported, capsys):
    (imported / "model").rename(imported / "elsewhere")
    try:
        assert run(imported, "run") == 0
        assert "5 finished" in lines(capsys)
        assert run(imported, "new", "pruned") == 2
        assert "is not a directory; a model on the hub is" in lines(capsys)
    finally:
        (imported / "elsewhere").rename(imported / "model")


def test_another_checkpoint_at_the_same_path_is_noticed(imported, capsys):
    spec = resolve_specs(load_recipe(imported / "recipe.yaml"), ["parent"])["parent"]
    export_hf(init_params(spec, jax.random.key(1)), spec, imported / "model", "float32", [])
    assert run(imported, "run") == 2
    assert "was begun with other data: path has other content than then" in lines(capsys)
