"""Workers of rewards end with their run and hear of no stop. How a run goes on afterwards: tests/chaos."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from harness import POST, gone, members

from ministral_jax.alignment.answer import Sample
from ministral_jax.alignment.rewards import UserReward
from ministral_jax.alignment.scoring import Scorer


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
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_does_not_reach_a_worker_that_is_starting(number):
    sample = Sample((), "a", None, "a", (1, 2, 3), "stop", False, {}, "row 1", 8)
    over = threading.Event()

    def stop() -> None:
        while not over.wait(0.005):
            for child in children(os.getpid()):
                with suppress(ProcessLookupError):
                    os.kill(child, number)

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
