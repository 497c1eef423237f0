"""What tells a lost peer from a fault, and what a process says of what comes next."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ministral_jax.distributed import processes

GLOO = "Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1"
LOST = [
    ValueError(f"UNKNOWN: {GLOO}"),  # while it is dispatched
    jax.errors.JaxRuntimeError(f"UNKNOWN: {GLOO}"),
    ValueError(f"FAILED_PRECONDITION: Buffer Definition Event: {GLOO}"),
    jax.errors.JaxRuntimeError("INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited"),
    jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: end::0. This usually happens because ..."),
    jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out with key: a and duration: 5s"),
    jax.errors.JaxRuntimeError("UNAVAILABLE: Failed to send RPC to coordination service."),
    jax.errors.JaxRuntimeError("CANCELLED: Coordination service is shutting down. Cancelling PollForErrorAsync()"),
    jax.errors.JaxRuntimeError("ABORTED: the task restarted"),
]
FAULTS = [
    ValueError("the peer review data has no column 'barrier'"),
    ValueError("could not read UNAVAILABLE: field"),
    RuntimeError("deadlock at a barrier: CANCELLED: by a peer"),
    RuntimeError(f"UNKNOWN: {GLOO}"),  # not the runtime's
    OSError(104, "Connection reset by peer"),  # of a reward that asks a server
    TimeoutError("coordination of the workers: heartbeat"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 64 bytes for the peer buffer"),
    jax.errors.JaxRuntimeError("INTERNAL: peer access is not supported"),
    KeyError("gloo"),
]


@pytest.fixture
def several(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)


def from_compiled_code(error: BaseException) -> BaseException:
    """The error as it is caught when compiled code, and no `raise` statement, threw it."""
    loop = asyncio.new_event_loop()
    future = loop.create_future()
    future.set_exception(error)
    loop.close()
    try:
        future.result()
    except type(error) as caught:
        return caught
    raise AssertionError


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except type(error) as caught:
        return caught


@pytest.mark.parametrize("error", LOST, ids=str)
def test_what_a_program_raises_is_no_lost_peer_even_in_the_runtimes_words(several, error):
    fault = raised(type(error)(str(error)))
    assert not processes.lost_peer(fault)
    wrapped = RuntimeError("of a reward")
    wrapped.__cause__ = fault
    assert not processes.lost_peer(wrapped)
    assert processes.lost_peer(from_compiled_code(type(error)(str(error))))


@pytest.mark.parametrize("error", LOST, ids=str)
def test_the_runtimes_errors_of_a_lost_peer_are_recognised(several, monkeypatch, error):
    assert processes.lost_peer(error)
    wrapped = RuntimeError("the state could not be saved")
    wrapped.__cause__ = error
    assert processes.lost_peer(wrapped)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    assert not processes.lost_peer(error), "one process has no peers"


@pytest.mark.parametrize("error", FAULTS, ids=str)
def test_faults_are_not_taken_for_a_lost_peer_whatever_they_say(several, error):
    assert not processes.lost_peer(error)
    error.__context__, error.__suppress_context__ = LOST[0], True
    assert not processes.lost_peer(error)


def test_each_batch_is_announced_before_it_is_worked_on_and_a_stop_comes_between_them(monkeypatch):
    job = processes._Job()
    monkeypatch.setattr(processes, "_job", job)
    told, worked = [], []
    processes.observe(told.append)
    with pytest.raises(processes.Preempted, match="reading batch 3"):
        for batch in processes.polled("abcd", "reading batch"):
            assert told[-1] == f"reading batch {len(told)}"
            worked.append(batch)
            job.asked = batch == "b"
    assert worked == ["a", "b"]
    processes.announce("scoring")
    processes.saving()
    assert told[2:] == ["reading batch 3", "scoring", "saving"]


@pytest.fixture
def job(monkeypatch):
    """What this process knows of a job that takes hours at some things, by a clock that is turned by hand."""
    found = processes._Job(processes.Limits(step=900, slow=3600))
    found.now = 0.0
    monkeypatch.setattr(processes, "_job", found)
    monkeypatch.setattr(processes.time, "monotonic", lambda: found.now)
    return found


def allowed(job, seconds: float, doing: str, slow: bool = False) -> float:
    """Seconds until the watchdog would end what is begun now; what was done before has taken `seconds`."""
    job.now += seconds
    processes.poll(doing, slow)
    return job.deadline - job.now


def test_the_limit_of_a_step_follows_the_measured_steps(job):
    assert allowed(job, 0, "step 1", slow=True) == 3600
    assert allowed(job, 2000, "step 2") == 3600, "none was measured: the first one was compiled too"
    assert allowed(job, 1150, "step 3") == 11500
    assert allowed(job, 1250, "evaluating batch 1", slow=True) == 3600
    assert allowed(job, 700, "evaluating batch 2") == 3600
    assert allowed(job, 1, "evaluating batch 3") == 900, "never below what is set"
    assert allowed(job, 1, "step 4") == 12000, "the median of 1150 and 1250"
    for step in range(5, 40):
        assert allowed(job, 20, f"step {step}") >= 900
    assert allowed(job, 20, "step 40") == 900, "of the last ones"
    assert allowed(job, 20, "step 1", slow=True) == 3600
    assert allowed(job, 20, "step 2") == 3600, "another stage's steps may be slower"


def test_what_is_slow_may_become_slower_and_what_one_process_does_alone_has_no_limit(job):
    for update in range(1, 4):
        job.now += 500
        processes.announce(f"update {update}")
    assert job.deadline - job.now == 5000
    processes.poll_alone("packing data: rows")
    assert job.deadline is None
    processes.poll("beginning parent", slow=True)
    with processes.unwatched():
        assert job.deadline is None
        job.now += 10_000
    assert job.deadline - job.now == 3600


INTERRUPTED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from ministral_jax import cli
from ministral_jax.distributed import processes

def command(args):
    processes.join(processes.Limits())
    for step in range(1, 600):
        processes.poll(f"step {step}")
        print(step, flush=True)
        time.sleep(0.1 if sys.argv[1] == "quick" else 600)

cli._parse = lambda argv: type("Args", (), {"command": staticmethod(command)})
sys.exit(cli.main())
"""


def interrupted(pace: str, times: int) -> tuple[int, str]:
    """Exit code and words of a command that gets Ctrl-C while it is at its steps."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, pace],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "1\n"
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        return process.wait(60), process.communicate()[1]
    finally:
        process.kill()


def test_ctrl_c_stops_before_the_next_step_and_claims_nothing_that_was_not_saved():
    code, said = interrupted("quick", 1)
    assert code == 130, said
    assert re.search(r"interrupted, before step \d+; what is finished is kept, the same command does the rest\n$", said)
    assert "saved" not in said and "Traceback" not in said


def test_a_second_ctrl_c_ends_at_once():
    begun = time.monotonic()
    code, said = interrupted("slow", 2)
    assert code == 130 and time.monotonic() - begun < 60, said
    assert said.splitlines()[-1].startswith("ministral-jax: interrupted twice, ended at once"), said


def test_the_first_batch_of_its_shapes_may_take_as_long_as_what_is_slow(job):
    limits = []
    for _ in processes.polled([{"tokens": np.zeros(n)} for n in (2, 2, 2, 4, 4, 2)], "evaluating batch"):
        limits.append(job.deadline - job.now)
        job.now += 1
    assert limits == [3600, 3600, 900, 3600, 3600, 900]
    assert allowed(job, 1, "step 1") == 3600
    assert allowed(job, 1, "step 2") == 900
    processes.compiles()
    assert job.deadline - job.now == 3600
    assert allowed(job, 2000, "step 3") == 3600, "a peer may compile still"
