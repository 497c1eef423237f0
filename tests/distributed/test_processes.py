"""What tells a lost peer from a fault, and what a process says of what comes next."""

import jax
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
