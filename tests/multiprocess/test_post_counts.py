"""Post-training with one mesh in one and two processes, and with other meshes: the same answers and figures."""

from pathlib import Path

import pytest
from harness import POST, POST_TRAINED, Job, answers, assert_same_figures, copied, gone, records

pytestmark = pytest.mark.multiprocess

# The mesh and so the program are the same; collectives add float32 numbers in another order inside a process and
# between them, which for two addends is no other order at all, as in `test_counts.py`. A token is the argmax of
# log-probabilities and a draw that is the same to the bit: another token only where two candidates are closer than
# rounding, some 1e-7 of 500 candidates whose best two are about 1 apart. So answers, rewards and lengths are the same.
RELATIVE = 2e-6
# A loss of policy gradients is a difference of numbers of size 1: its error is that of these.
ABSOLUTE = 2e-6
STEPS = ("stages.parent.steps=2", *(f"stages.{stage}.steps=4" for stage in ("sft", "reward", "instruct", "rl")))
LATER = ("reward", "instruct", "rl", "recipe.json")


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    """Base, SFT and reward models of two devices in one process."""
    run_dir = tmp_path_factory.mktemp("post_counts") / "one"
    with Job(run_dir, 1, 2, "rl", "instruct", *STEPS, recipe=POST) as job:
        job.finish()
    return run_dir


def test_the_number_of_processes_changes_nothing(parent, tmp_path):
    run_dir = tmp_path / "two"
    with Job(run_dir, 2, 1, "rl", "instruct", *STEPS, recipe=POST) as job:
        job.finish()
    posted = POST_TRAINED[1:]
    for stage in posted:
        assert [a["answer"] for a in answers(run_dir, stage)] == [a["answer"] for a in answers(parent, stage)], stage
    assert_same_figures(run_dir, parent, posted, RELATIVE, ABSOLUTE)


def test_another_mesh_draws_the_same_answers(parent, tmp_path):
    """Of the policy that all begin with: its evaluation and its first step, in which every answer counts."""
    run_dir = copied(tmp_path / "mesh", parent, *LATER)
    mesh = ("mesh.fsdp=2", "mesh.tensor=2")
    with Job(run_dir, 1, 4, "rl", *STEPS, "stages.rl.steps=1", *mesh, recipe=POST, pace=0.02) as job:
        assert job.until(lambda: job.has("rl//scoring")) and job.until(lambda: job.has("rl/1/")), job.tails()
        first = answers(run_dir, "rl")
        assert job.wait() == [0], job.tails()
    other = copied(tmp_path / "other", parent, *LATER)
    with Job(other, 1, 1, "rl", *STEPS, "stages.rl.steps=1", recipe=POST, pace=0.02) as job:
        assert job.until(lambda: job.has("rl/1/")), job.tails()
        assert first == answers(other, "rl") and first
        assert job.wait() == [0], job.tails()
    ours, theirs = (records(run, "rl", "train")[0] for run in (run_dir, other))
    drawn = ("reward", "reward_wordy", "reward_format", "tokens_drawn", "completion_length", "groups_with_signal")
    assert {key: ours[key] for key in drawn} == {key: theirs[key] for key in drawn}


@pytest.mark.parametrize("on_error", ["stop", "drop"])
def test_a_reward_that_fails_on_one_process(parent, tmp_path, on_error):
    """Both end with what that one says; where answers may be dropped, half of all are not too many."""
    run_dir = copied(tmp_path / "fails", parent, *LATER)
    function = "stages.rl.rewards.wordy.function=post_cases:fails_on_the_second_process"
    words = (*STEPS, "stages.rl.steps=1", function, f"stages.rl.on_error={on_error}")
    with Job(run_dir, 2, 1, "rl", *words, recipe=POST) as job:
        assert job.wait() == ([2, 2] if on_error == "stop" else [0, 0]), job.tails()
        for i in (0, 1) if on_error == "stop" else (1,):
            assert "the reward wordy of " in job.log(i) and "raised ValueError: no reward here" in job.log(i)
            assert gone(job.processes[i].pid), "workers of rewards outlive the run"
    if on_error == "drop":
        assert records(run_dir, "rl", "train")[0]["reward_errors"] == 0.5
    assert (run_dir / "rl" / "manifest.json").exists() == (on_error == "drop")
