"""Killed or stopped while it samples and while it learns, a post-training stage goes on and ends in the same bits.

tests/chaos harms every kind of stage at every kind of moment.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from harness import POST, POST_TRAINED, RETRY, Job, answers, assert_same_bits, gone, members, records

from ministral_jax.alignment.answer import Sample
from ministral_jax.alignment.rewards import UserReward
from ministral_jax.alignment.scoring import Scorer

STEPS = ("stages.parent.steps=2", *(f"stages.{stage}.steps=4" for stage in ("sft", "reward", "instruct", "rl")))
KILL, STOP = signal.SIGKILL, signal.SIGTERM
MOMENTS = (
    ("sft/4/sampling token", KILL),  # its examination
    ("rl/2/scoring", STOP),
    ("rl/4/update 3", KILL),  # of four: the same answers are used again
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("post") / "unbroken"
    with Job(run_dir, 1, 1, *STEPS, recipe=POST) as job:
        job.finish()
    return run_dir


def test_the_run_has_what_is_to_be_compared(unbroken):
    """Answers that were drawn, and groups that are learnt from."""
    assert all(len({a["answer"] for a in answers(unbroken, stage)}) > 1 for stage in ("sft", "instruct", "rl"))
    assert all(r["groups_with_signal"] > 0 for r in records(unbroken, "rl", "train"))
    assert [len(records(unbroken, stage, "train")) for stage in POST_TRAINED] == [2, 4, 4, 4, 4]


def test_killed_or_stopped_it_ends_in_the_same_bits(unbroken, tmp_path):
    """A stop is sent to all processes of a job, as schedulers do: workers of rewards finish the step's."""
    run_dir = tmp_path / "run"
    for moment, harm in MOMENTS:
        with Job(run_dir, 1, 1, *STEPS, recipe=POST, pace=0.02) as job:
            assert job.until(lambda job=job, moment=moment: job.has(moment)), job.tails()
            assert job.codes() == [None], job.tails()
            if harm is KILL:
                job.send(KILL, 0)
            else:
                os.killpg(job.processes[0].pid, STOP)
            assert job.wait() == [RETRY if harm is STOP else -KILL], job.tails()
            assert gone(job.processes[0].pid), f"{moment}: workers of rewards outlive the run"
    with Job(run_dir, 1, 1, *STEPS, recipe=POST) as job:
        job.finish()
    assert_same_bits(run_dir, unbroken, POST_TRAINED)


def children(pid: int) -> set[int]:
    """Child processes, but the one that multiprocessing keeps for itself."""
    found = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found |= {int(child) for child in path.read_text().split()}
    return {child for child in found if b"resource_tracker" not in _command(child)}


def _command(pid: int) -> bytes:
    """Empty when the process has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stop_does_not_reach_a_worker_that_is_starting():
    sample = Sample((), "a", None, "a", (1, 2, 3), "stop", False, {}, "row 1", 8)
    over = threading.Event()

    def stop() -> None:
        while not over.wait(0.005):
            for child in children(os.getpid()):
                with suppress(ProcessLookupError):
                    os.kill(child, STOP)

    harm = threading.Thread(target=stop)
    harm.start()
    try:
        with Scorer({"spread": UserReward(kind="user", function="post_cases:spread")}, 2) as scorer:
            assert scorer.score([sample] * 4).parts["spread"].tolist() == [6 / 97] * 4
    finally:
        over.set()
        harm.join()


ASLEEP = """
from ministral_jax.alignment.rewards import UserReward
from ministral_jax.alignment.answer import Sample
from ministral_jax.alignment.scoring import Scorer

if __name__ == "__main__":
    sample = Sample((), "a", None, "a", (1,), "stop", False, {}, "row 1", 8)
    Scorer({"asleep": UserReward(kind="user", function="post_cases:asleep")}, 2, 60).score([sample] * 2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("seconds", [0, 0.05, 0.15, 2])
def test_workers_of_a_killed_run_end(tmp_path, seconds):
    """While they start, and at work."""
    (tmp_path / "asleep.py").write_text(ASLEEP)
    environment = {**os.environ, "PYTHONPATH": str(POST.parent)}
    command = [sys.executable, str(tmp_path / "asleep.py")]
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not children(process.pid):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    process.wait()
    assert gone(process.pid), members(process.pid)
