"""Faults of post-training's data, rewards and settings, by the command line: one sentence that names the row, before
anything is computed; what only shows in a run stops it or is left out as the recipe says, and is never a zero."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from paths import TESTS

from ministral_jax.runs import cascade

RECIPE = str(TESTS / "micro_post.yaml")


pytestmark = pytest.mark.usefixtures("one_device", "no_stage_runs")


@pytest.fixture
def no_stage_runs(monkeypatch):
    """A fault that comes late fails here, not after a training."""

    def begun(job):
        pytest.fail(f"{job.name} was begun")

    monkeypatch.setattr(cascade, "_run_stage", begun)


def nothing_begun(run_dir: Path) -> bool:
    """No stage, of the parents neither; packed data may be there."""
    return not run_dir.exists() or {p.name for p in run_dir.iterdir()} <= {"data", "ledger.jsonl", ".owner", "log.txt"}


USER, SAID = {"role": "user", "content": "2+2=?"}, {"role": "assistant", "content": "4"}
ROWS = {
    "roles": ("sft", {"messages": [SAID, USER]}, "role"),
    "two of the user's in a row": ("sft", {"messages": [USER, {"role": "system", "content": "Be."}, SAID]}, "system"),
    "a tool's result without call": (
        "sft",
        {"messages": [USER, {"role": "tool", "content": "4", "tool_call_id": "123456789"}, SAID]},
        "tool",
    ),
    "an image that is missing": ("sft", {"question": "Sum?", "answer": "4", "image": "none.png"}, "none.png"),
    "an answer that is empty": ("sft", {"messages": [USER, {"role": "assistant", "content": ""}]}, "empty"),
    "an answer of spaces": ("sft", {"question": "2+2=?", "answer": " "}, "'answer' must be text that is not empty"),
    "a prompt that is too long": ("rl", {"question": "word " * 300, "answer": "4"}, "max_prompt_length is 64"),
    "a gold answer that cannot be parsed": ("rl", {"question": "2+2=?", "answer": "no number"}, "answer"),
    "a column that is missing": ("rl", {"prompt": "2+2=?"}, "answer"),
    "a pair without chosen": ("reward", {"prompt": "2+2=?", "rejected": "5", "answer": "4"}, "chosen"),
    "a pair of equals": ("reward", {"prompt": "2+2=?", "chosen": "4", "rejected": "4"}, "are the same"),
    "a conversation for a judge": ("reward", {"question": "2+2=?", "answer": "4"}, "is no pair"),
    "a conversation for offline DPO": ("offline", {"question": "2+2=?", "answer": "4"}, "is no pair"),
    "a pair the wrong way round": (
        "offline",
        {"prompt": "2+2=?", "chosen": "4", "rejected": "5", "probability": 0.3},
        "must be from 1/2 to 1",
    ),
    "a pair longer than a row": (
        "offline",
        {"prompt": "2+2=?", "chosen": "4", "rejected": "word " * 200, "probability": 0.9},
        "in two answers",
    ),
    "a pair of which nobody knows how sure": (
        "offline",
        {"prompt": "2+2=?", "chosen": "4", "rejected": "5"},
        "has neither 'probability' nor 'score_chosen'",
    ),
}


@pytest.mark.parametrize("fault", ROWS)
def test_a_row_at_fault_is_named_before_anything_is_computed(fault, refused, tmp_path):
    stage, row, words = ROWS[fault]
    good: list[dict] = [{"question": f"{n}+1=?", "answer": str(n + 1)} for n in range(30)]
    if stage in ("reward", "offline"):
        pair: dict = {"rejected": "x", "answer": "", "probability": 0.8}
        good = [{"prompt": f"{n}+1=?", "chosen": str(n + 1), **pair} for n in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [*good[:3], row, *good[4:]]))
    found = f"{{sums: null, digits: null, pairs: null, rows: {{kind: jsonl, path: {path}}}}}"
    rewards = ["stages.rl.rewards.accuracy={}", "stages.rl.evaluate.prompts=64"] if stage == "rl" else []
    if stage == "offline":
        rewards = [f"stages.offline.{key}" for key in ("pairs=null", "generate=null", "loss.loss_type=odpo")]
    message = refused(RECIPE, tmp_path / "run", f"stages.{stage}.data.sources={found}", *rewards, stage)
    assert "rows.jsonl row 4" in message and words in message, message
    assert nothing_begun(tmp_path / "run")


SETTINGS = {
    "a judge that is no reward stage": (["stages.instruct.judge=sft"], "judge = 'sft' must be a reward stage"),
    "a judge that does not exist": (["stages.instruct.judge=rewards"], "did you mean reward?"),
    "judge and rewards": (["stages.instruct.rewards={format: {}}"], "either a `judge`"),
    "neither": (["stages.instruct.judge=null"], "either a `judge`"),
    "unknown key of a reward": (["stages.rl.rewards.format.thinkng=true"], "did you mean thinking?"),
    "unknown kind of reward": (["stages.rl.rewards.acuracy={}"], "did you mean accuracy?"),
    "unknown key of a stage": (["stages.rl.num_generation=4"], "did you mean num_generations?"),
    "lengths that begin late": (["defaults.grpo.max_completion_length=null", "stages.rl.max_completion_length={5: 10}"],
                                "from step 0 on"),
    "microbatches": (["stages.rl.microbatches=3"], "must be a multiple of"),
    "updates of a step": (["stages.rl.steps_per_generation=3"], "steps_per_generation"),
    "a function that is not there": (
        ["stages.rl.rewards.wordy.function=post_cases:spred"], "post_cases:spred cannot be imported"),
    "tools that are not there": (["stages.instruct.tools=post_cases:tols"], "post_cases:tols cannot be imported"),
    "no prompt held out": (["data.held_out=0", "rl"], "no prompt is held out"),
    "pairs of no pairs stage": (["stages.offline.pairs=sft", "offline"], "pairs = 'sft' must be a pairs stage"),
    "pairs of a stage that is not there": (["stages.offline.pairs=pars", "offline"], "did you mean pairs?"),
    "prompts of the pairs asked as held-out ones": (
        ["stages.offline.generate={prompts: 2}", "stages.offline.data.held_out=0.6", "offline"],
        "would ask prompts of which the policy learns",
    ),
    "rows too short for two answers": (["stages.offline.batch.length=64", "offline"], "two of the longest answers"),
    "an odd number of answers": (["stages.pairs.num_generations=3", "offline"], "num_generations"),
    "pairs without a judge": (["stages.pairs.judge=null", "offline"], "either a `judge`"),
    "a loss that is none": (["stages.offline.loss.loss_type=hinge", "offline"], "loss_type"),
    "a model from pairs": (["stages.offline.from=pairs", "offline"], "pairs"),
    "sources without pairs": (["stages.offline.pairs=null", "offline"], "has no pairs"),
    "no pair held out of those to be made": (
        ["stages.offline.generate=null", "stages.offline.data.held_out=0", "offline"],
        "holds no pair out",
    ),
    "no pair held out": (
        ["stages.offline.pairs=null", "stages.offline.generate=null", "stages.offline.data.held_out=0",
         "stages.offline.data.sources={sums: null, digits: null, made: {kind: preferences, limit: 40}}", "offline"],
        "holds no pair out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", SETTINGS)
def test_a_setting_at_fault_is_named_before_anything_is_computed(fault, refused, tmp_path):
    words, expected = SETTINGS[fault]
    message = refused(RECIPE, tmp_path / "run", *words)
    assert expected in message, message
    assert nothing_begun(tmp_path / "run")
