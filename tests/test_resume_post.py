"""Killed or stopped at any moment of a post-training stage, a run goes on and ends in the same bits."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from harness import POST, POST_TRAINED, RETRY, Job, answers, assert_same_bits, gone, records, warmed

KILLED = (
    "sft/4/sampling token",  # its examination
    "reward/4/judging pair",  # calibration
    "instruct/1/judging pair",
    "instruct/4/update 1",
    "rl/2/sampling token",
    "rl/4/update 3",  # the first minibatch again: step 4's rollout is used twice
    "rl/6/scoring",
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("post") / "unbroken"
    with Job(run_dir, 1, recipe=POST) as job:
        job.finish()
    return run_dir


def test_the_run_shows_what_is_compared(unbroken):
    """Answers that a draw decides, minibatches with a signal, and losers that loop or not."""
    assert all(len({a["answer"] for a in answers(unbroken, stage)}) > 1 for stage in ("sft", "instruct", "rl"))
    assert all(r["groups_with_signal"] > 0 for r in records(unbroken, "rl", "train"))
    assert [len(records(unbroken, stage, "train")) for stage in POST_TRAINED] == [4, 6, 6, 6, 6]


def test_killed_in_every_kind_of_stage_it_ends_in_the_same_bits(unbroken, tmp_path):
    run_dir = warmed(tmp_path / "killed", unbroken)
    for moment in KILLED:
        with Job(run_dir, 1, recipe=POST, pace=0.02) as job:
            assert job.until(lambda job=job, moment=moment: job.has(moment)), job.tails()
            assert job.codes() == [None], job.tails()
            job.send(signal.SIGKILL, 0)
            job.wait()
            assert gone(job.processes[0].pid), "a reward's workers outlive the run"
    with Job(run_dir, 1, recipe=POST) as job:
        job.finish()
    assert_same_bits(run_dir, unbroken, POST_TRAINED)


def test_stopped_while_it_samples_and_while_it_scores_it_saves_and_goes_on(unbroken, tmp_path):
    """A scheduler stops all processes of a job, so those of rewards too."""
    run_dir = warmed(tmp_path / "stopped", unbroken)
    for name in ("data", "parent", "sft", "reward"):
        shutil.copytree(unbroken / name, run_dir / name)
    for moment, saved in (("instruct//sampling token", 0), ("instruct/4/sampling token", 3), ("rl/4/scoring", 4)):
        with Job(run_dir, 1, recipe=POST, pace=0.02) as job:
            assert job.until(lambda job=job, moment=moment: job.has(moment)), job.tails()
            os.killpg(job.processes[0].pid, signal.SIGTERM)
            assert job.wait() == [RETRY], job.tails()
            assert gone(job.processes[0].pid) and "left out" not in job.log(), job.tails()
        assert (run_dir / moment.split("/")[0] / "state" / str(saved)).is_dir(), job.tails()
    with Job(run_dir, 1, recipe=POST) as job:
        job.finish()
    assert_same_bits(run_dir, unbroken, POST_TRAINED)
