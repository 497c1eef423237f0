"""This machine: N processes of one job, watched; none outlives the launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from ministral_jax.distributed.lifetime import die_with
from ministral_jax.distributed.processes import RETRY
from ministral_jax.launching.job import LocalJob

PATIENCE = 10.0
"""Seconds that the others get to end by themselves when a process has died."""

Worker = Callable[[int, int], Sequence[str]]
"""From (index, port of process 0) to the words of a process's command."""


def run(job: LocalJob, command: tuple[str, ...]) -> int:
    """Run `command` (the words of a `ministral-jax` command) as `processes` processes; the exit code of all of them.

    After 75 it is started again, `restarts` times at the most, unless the launcher itself was asked to stop.
    """
    return supervise(
        lambda index, port: [sys.executable, "-m", "ministral_jax", *command, *_options(job, index, port)],
        job.processes,
        job.restarts,
        {**os.environ, **job.environment},
    )


def _options(job: LocalJob, index: int, port: int) -> list[str]:
    devices = ["--cpu-devices", str(job.cpu_devices)] if job.cpu_devices else []
    if job.processes == 1:
        return devices
    place = ["--coordinator", f"127.0.0.1:{port}", "--process-count", str(job.processes), "--process-index", str(index)]
    return [*place, *devices]


def supervise(worker: Worker, count: int, restarts: int, environment: dict[str, str]) -> int:
    """Start `count` workers and stay until all are gone. SIGTERM and SIGINT are passed on, and end the restarts."""
    running: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def pass_on(signum: int, frame: object) -> None:
        asked.append(signum)
        _signal(running, signum)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        for attempt in range(restarts + 1):
            code = _attempt(worker, count, environment, running, asked)
            if code != RETRY or asked or attempt == restarts:
                return code
            print(f"launch: exit code {code}, started again ({attempt + 1} of {restarts})", file=sys.stderr, flush=True)
        raise AssertionError("unreachable")
    finally:
        _signal(running, signal.SIGKILL)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _attempt(
    worker: Worker, count: int, environment: dict[str, str], running: list[subprocess.Popen[bytes]], asked: list[int]
) -> int:
    port = _free_port()
    running.clear()
    readers: list[threading.Thread] = []
    for index in range(count):
        running.append(_start(worker(index, port), index, environment))
        if asked:  # while this one was being started
            _signal(running, asked[-1])
    for index, process in enumerate(running[1:], 1):
        readers.append(threading.Thread(target=_relay, args=(process, index), daemon=True))
        readers[-1].start()
    codes = _wait(running)
    for reader in readers:
        reader.join(1)  # a grandchild may hold the pipe open
    return outcome(codes)


def _start(words: Sequence[str], index: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """In a session of its own: a terminal's Ctrl-C reaches it once, from here, and its children end with it."""
    return subprocess.Popen(
        words,
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE if index else None,
        start_new_session=True,
        preexec_fn=partial(die_with, os.getpid()) if sys.platform == "linux" else None,
    )


def _relay(process: subprocess.Popen[bytes], index: int) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        sys.stderr.write(f"[{index}] {line.decode(errors='replace')}")
        sys.stderr.flush()


def _wait(running: list[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes of the processes that ended by themselves, after all have ended."""
    deadline: float | None = None
    killed: set[int] = set()
    while None in (codes := [process.poll() for process in running]):
        if deadline is None and any(codes):
            deadline = time.monotonic() + PATIENCE
        if deadline is not None and time.monotonic() > deadline and not killed:
            killed = {process.pid for process in running if process.returncode is None}
            _signal(running, signal.SIGKILL)
        time.sleep(0.05)
    _signal(running, signal.SIGKILL)  # what they may have left behind
    return [process.returncode for process in running if process.pid not in killed]


def _signal(running: list[subprocess.Popen[bytes]], signum: int) -> None:
    """To a worker, or with SIGKILL to all of its process group, the worker's children included."""
    for process in running:
        try:
            if signum == signal.SIGKILL:
                os.killpg(process.pid, signum)
            elif process.returncode is None:
                os.kill(process.pid, signum)
        except (ProcessLookupError, PermissionError):
            pass


def outcome(codes: Sequence[int]) -> int:
    """A job's exit code: 0 when all are 0; 2 when any is 2; 75 when a signal killed any; else the first fault (peers'
    75 follow from it); else 75."""
    bad = [128 - code if code < 0 else code for code in codes if code != 0]
    if 2 in bad:
        return 2
    if any(code > 128 and code != 130 for code in bad):
        return RETRY
    return next((code for code in bad if code != RETRY), RETRY if bad else 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
