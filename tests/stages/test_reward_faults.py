"""A reward that fails in a run: it stops the run and names the row, or its answer is left out; it is never a zero."""

import json
import shutil
from pathlib import Path

import pytest
from paths import TESTS

from ministral_jax.cli import main

RECIPE = str(TESTS / "micro_post.yaml")
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def begun(tmp_path_factory, one_device) -> Path:
    """A run whose policy is ready to be trained."""
    run_dir = tmp_path_factory.mktemp("faults") / "run"
    assert main(["run", RECIPE, "sft", "--run-dir", str(run_dir)]) == 0
    return run_dir


def run(begun: Path, run_dir: Path, function: str, on_error: str) -> int:
    """Two steps of GRPO on a copy of the run, rewarded by a function that fails."""
    shutil.copytree(begun, run_dir)
    words = [
        "stages.rl.steps=2",
        f"defaults.grpo.rewards={{mine: {{kind: user, function: 'post_cases:{function}'}}}}",
        f"stages.rl.on_error={on_error}",
        f"stages.rl.reward_seconds={4 if function == 'sometimes_sleeps' else 60}",
    ]
    return main(["run", RECIPE, "rl", *words, "--run-dir", str(run_dir)])


@pytest.mark.parametrize(
    ("function", "what"), [("sometimes_raises", "ValueError: cannot judge that"), ("sometimes_sleeps", "than 4 s")]
)
def test_stop_names_the_reward_and_the_row(begun, tmp_path, capsys, function, what):
    assert run(begun, tmp_path / "run", function, "stop") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("ministral-jax: the reward mine of ") and what in line, line
    assert "arithmetic" in line or "digit-sum" in line  # the row
    for file in (begun / "sft").rglob("*"):
        assert file.is_dir() or (tmp_path / "run" / file.relative_to(begun)).read_bytes() == file.read_bytes()
    assert not (tmp_path / "run" / "rl" / "manifest.json").exists()


def test_drop_leaves_the_answer_out_and_counts_it(begun, tmp_path, capsys):
    assert run(begun, tmp_path / "run", "sometimes_raises", "drop") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    lines = (tmp_path / "run" / "rl" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    assert any(record["reward_errors"] > 0 for record in records) == bool(said) and said
    assert all("cannot judge that" in line for line in said)
    # the others' mean: zeros for those that failed would pull it down
    assert all(record["reward"] == pytest.approx(record["reward_mine"]) for record in records)
    assert all(record["reward"] > 0.2 for record in records)


def test_guard_equal_rewards_teach_nothing_and_say_so(begun, tmp_path, capsys):
    assert run(begun, tmp_path / "run", "always_one", "drop") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "nothing is learnt" in line]
    assert len(said) == 2 and "rl  nothing is learnt from 1 step: the " in said[0] and "2 steps in a row" in said[1]
    lines = (tmp_path / "run" / "rl" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    assert [(r["reward"], r["groups_with_signal"], r["gradient_norm"]) for r in records] == [(1, 0, 0)] * 2
    assert not any("NaN" in line for line in lines)


def test_drop_stops_when_most_fail(begun, tmp_path, capsys):
    assert run(begun, tmp_path / "run", "always_raises", "drop") == 2
    assert "16 of 16 samples could not be scored" in capsys.readouterr().err


def test_what_is_too_hard_is_left_out_and_groups_without_a_signal_are_replaced(begun, tmp_path, capsys):
    """A model of six steps hardly solves any sum: a band from 0 keeps the prompts, one above it leaves none."""
    run_dir = tmp_path / "run"
    shutil.copytree(begun, run_dir)
    words = ["stages.rl.steps=1", "stages.rl.data.sources={sums: {limit: 12}, digits: null}"]
    words += ["defaults.grpo.rewards={accuracy: {}, noise: {kind: user, function: 'post_cases:of_some'}}"]
    band = "stages.rl.difficulty={completions: 4, min_pass_rate: %s}"
    assert main(["run", RECIPE, "rl", *words, band % 0.9, "--run-dir", str(run_dir)]) == 2
    assert "0 of 9 prompts have a pass rate from 0.9 to 0.95; widen the band" in capsys.readouterr().err
    assert main(["run", RECIPE, "rl", *words, band % 0, "--run-dir", str(run_dir)]) == 0
    assert "9 of 9 prompts have a pass rate from 0 to 0.95" in capsys.readouterr().err
    assert len(json.loads((run_dir / "rl" / "difficulty.json").read_text())["rates"]) == 9
    lines = (run_dir / "rl" / "metrics.jsonl").read_text().splitlines()
    (record,) = (record for record in map(json.loads, lines) if record["kind"] == "train")
    assert record["prompts_drawn"] > 4 and 0 < record["groups_with_signal"] < 1


def test_optional_stages_are_run_when_named_or_with_all(tmp_path, capsys, monkeypatch):
    from ministral_jax.runs import cascade

    ran = []
    monkeypatch.setattr(cascade, "_run_stage", lambda job, contents: ran.append(job.name))
    base = ["run", RECIPE, "stages.rl.optional=true", "stages.hf.optional=true", "--run-dir", str(tmp_path / "run")]
    main(base)
    assert ran == ["parent", "sft", "reward", "instruct"]
    ran.clear()
    main([*base, "hf"])
    assert ran == ["parent", "sft", "rl", "hf"]
    ran.clear()
    main([*base, "--all"])
    assert ran == ["parent", "sft", "reward", "instruct", "pairs", "offline", "rl", "hf"]
