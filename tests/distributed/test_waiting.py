"""Two processes, of which one waits for process 0 far beyond every limit."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harm_cases import free_port

WORKER = Path(__file__).with_name("waiting_worker.py")
RETRY = 75


def run(what: str) -> tuple[list[int], list[str], float]:
    """Exit codes, what they said, and seconds between the ends of process 0 and of the other."""
    port = str(free_port())
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    start = lambda index: subprocess.Popen(
        [sys.executable, str(WORKER), port, str(index), what],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    jobs = [start(index) for index in range(2)]
    try:
        said = [jobs[0].communicate(timeout=200)[0]]
        first = time.monotonic()
        said.append(jobs[1].communicate(timeout=100)[0])
        return [job.returncode for job in jobs], said, time.monotonic() - first
    finally:
        for job in jobs:
            job.kill()


@pytest.mark.parametrize("what", ["work", "barrier"])
def test_waiting_for_process_0_never_ends_a_healthy_job(what):
    codes, said, _ = run(what)
    assert codes == [0, 0], said
    assert all("done" in text for text in said), said


def test_a_process_0_that_died_at_its_work_is_noticed():
    codes, said, waited = run("death")
    assert codes[0] == 9 and (codes[1] == RETRY or codes[1] < 0), (codes, said)
    assert waited < 15 and "done" not in said[1], said


def test_a_bug_of_process_0_is_not_a_lost_peer_to_itself_whatever_it_says():
    codes, said, _ = run("bug")
    assert codes[0] == 1 and (codes[1] == RETRY or codes[1] < 0), (codes, said)
    assert "Traceback" in said[0] and "ValueError: UNAVAILABLE: a field of the data" in said[0], said[0]
