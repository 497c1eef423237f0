"""Shares of answers to held-out prompts stand with their error: in all and of each source, wherever they are told."""

from __future__ import annotations

import json

import pytest
from report_run import POST, told_by, write_run
from rich.console import Console
from scipy.stats import binomtest

from ministral_jax.alignment.examine import prompts_by_source
from ministral_jax.runs.reading import read_run
from ministral_jax.runs.tables import stage_table
from ministral_jax.stages.figures import (
    ACCURACY,
    ANSWERS,
    ECE,
    LOOP_RATE,
    REWARD,
    WIN_RATE,
    Figure,
    share_of,
    told,
    wilson,
)
from ministral_jax.stages.reward import Reward

METRICS = {
    "ece": 0.1, "reward": 0.5, "loop_rate": 0.25, "accuracy": 0.375, "accuracy_sums": 0.5,
    "accuracy_pictures": 0.25, **prompts_by_source(["sums", "pictures", "sums", "pictures"] * 2),
}  # fmt: skip


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (0, 26), (13, 26), (25, 26), (51, 51), (400, 512)])
def test_the_interval_is_wilsons(right, count):
    expected = binomtest(right, count).proportion_ci(0.95, "wilson")
    assert wilson(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_prompts_are_counted_by_source_where_there_are_several():
    assert {key: METRICS[key] for key in METRICS if key.startswith("prompts")} == {
        "prompts": 8, "prompts_sums": 4, "prompts_pictures": 4,
    }  # fmt: skip
    assert prompts_by_source(["sums"] * 3) == {"prompts": 3}


def test_what_is_no_share_of_answers_has_no_interval():
    assert share_of(METRICS, REWARD) is None is share_of(METRICS, ECE)  # of tokens
    assert share_of(METRICS | {"right": 0.5}, Figure("right", "pairs in the right order", "share")) is None  # of pairs
    judged = next(figure for figure in Reward.figures if figure.name == "judge_accuracy")
    assert share_of(METRICS | {"judge_accuracy": 0.5, "judge_pairs": 75}, judged).count == 75
    assert share_of(METRICS | {"win_rate": 0.5}, WIN_RATE).count == 8
    assert share_of(METRICS | {"accuracy": 1.5}, ACCURACY) is None
    assert share_of({"accuracy": 0.5}, ACCURACY) is None  # nobody says of how many
    assert share_of(METRICS, ACCURACY, "sums").count == 4 and share_of(METRICS, LOOP_RATE).count == 8


def test_what_is_said_as_it_comes():
    assert told(ANSWERS, METRICS) == [
        "right answers 37.5% (13.7 to 69.4, n = 8): sums 50.0% (15.0 to 85.0, n = 4), "
        "pictures 25.0% (4.6 to 69.9, n = 4)"
    ]


def test_summary_and_table_have_them(tmp_path):
    run = write_run(tmp_path / "run", more=POST)
    answers = json.loads((run / "summary.json").read_text())["answers"]
    assert set(answers) == {"14b-sft", "14b-instruct", "14b-cot", "14b-rl"}  # a judge answers no prompts
    metrics, found = told_by(run, "14b-sft")["metrics"], answers["14b-sft"]["accuracy"]
    assert set(answers["14b-sft"]) == {"accuracy", "pass@8", "loop_rate"}
    for source, count in (("sums", 38), ("pictures", 26)):
        value = metrics[f"accuracy_{source}"]
        low, high = wilson(value, count)
        assert found["sources"][source] == {"value": value, "count": count, "low": low, "high": high}
    assert found["every"]["count"] == 64 and found["every"]["value"] == metrics["accuracy"]

    console = Console(width=200)
    with console.capture() as capture:
        console.print(stage_table(read_run(run), ["14b-sft"]))
    low, high = (f"{100 * end:.1f}" for end in wilson(metrics["accuracy_pictures"], 26))
    assert f"  pictures {metrics['accuracy_pictures']:.1%} ({low} to {high}, n = 26)" in capture.get()
