"""This machine: N processes of one job, watched; none outlives the launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from ministral_jax.distributed.lifetime import die_with
from ministral_jax.distributed.processes import RETRY
from ministral_jax.recipe.launch import LocalLaunch

PATIENCE = 10.0
"""Seconds that the others get to end by themselves when a process has died."""

Worker = Callable[[int, int], Sequence[str]]
"""From (index, port of process 0) to the words of a process's command."""
Process = subprocess.Popen[bytes]


def run(job: LocalLaunch, command: tuple[str, ...]) -> int:
    """Run `command` (the words of a `ministral-jax` command) as `processes` processes; the exit code of all of them.

    After 75 it is started again, `restarts` times at the most, unless the launcher itself was asked to stop.
    """
    words = [sys.executable, "-m", "ministral_jax", *command]
    words += ["--cpu-devices", str(job.cpu_devices)] if job.cpu_devices else []

    def worker(index: int, port: int) -> list[str]:
        place = ["--coordinator", f"127.0.0.1:{port}", "--process-count", str(job.processes)]
        return [*words, *place, "--process-index", str(index)] if job.processes > 1 else words

    return supervise(worker, job.processes, job.restarts, {**os.environ, **job.environment})


def supervise(worker: Worker, count: int, restarts: int, environment: Mapping[str, str]) -> int:
    """Start `count` workers and stay until all are gone. SIGTERM and SIGINT are passed on, and end the restarts."""
    running: list[Process] = []
    asked: list[int] = []

    def pass_on(signum: int, frame: object) -> None:
        asked.append(signum)
        _signal(running, signum)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGTERM, signal.SIGINT)}
    attempt = 0
    try:
        while True:
            port = _free_port()
            running.clear()
            for index in range(count):
                running.append(_start(worker(index, port), index, environment))
                if asked:  # while this one was being started
                    _signal(running, asked[-1])
            code = outcome(_wait(running))
            if code != RETRY or asked or attempt == restarts:
                return code
            attempt += 1
            print(f"launch: exit code {code}, started again ({attempt} of {restarts})", file=sys.stderr, flush=True)
    finally:
        _signal(running, signal.SIGKILL)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(words: Sequence[str], index: int, environment: Mapping[str, str]) -> Process:
    """In a session of its own: a terminal's Ctrl-C reaches it once, from here, and its children end with it."""
    return subprocess.Popen(
        words,
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE if index else None,
        start_new_session=True,
        preexec_fn=partial(die_with, os.getpid()) if sys.platform == "linux" else None,
    )


def _wait(running: Sequence[Process]) -> list[int]:
    """Exit codes of the processes that ended by themselves, after all have ended."""
    readers = [threading.Thread(target=_relay, args=(p, i), daemon=True) for i, p in enumerate(running) if i]
    for reader in readers:
        reader.start()
    deadline = None
    killed: set[int] = set()
    while None in (codes := [process.poll() for process in running]):
        if deadline is None and any(codes):
            deadline = time.monotonic() + PATIENCE
        if deadline is not None and time.monotonic() > deadline and not killed:
            killed = {process.pid for process in running if process.returncode is None}
            _signal(running, signal.SIGKILL)
        time.sleep(0.05)
    _signal(running, signal.SIGKILL)  # what they may have left behind
    for reader in readers:
        reader.join(1)  # a grandchild may hold the pipe open
    return [process.returncode for process in running if process.pid not in killed]


def _relay(process: Process, index: int) -> None:
    for line in process.stderr or ():
        sys.stderr.write(f"[{index}] {line.decode(errors='replace')}")
        sys.stderr.flush()


def _signal(running: Sequence[Process], signum: int) -> None:
    """To a worker, or with SIGKILL to all of its process group, the worker's children included."""
    for process in running:
        with suppress(ProcessLookupError, PermissionError):
            if signum == signal.SIGKILL:
                os.killpg(process.pid, signum)
            elif process.returncode is None:
                os.kill(process.pid, signum)


def outcome(codes: Sequence[int]) -> int:
    """A job's exit code: 0 when all are 0; 2 when any is 2; 75 when a signal killed any; else the first fault (peers'
    75 follow from it); else 75."""
    bad = [128 - code if code < 0 else code for code in codes if code != 0]
    if 2 in bad:
        return 2
    if any(code > 128 and code != 130 for code in bad):
        return RETRY
    return next((code for code in bad if code != RETRY), RETRY if bad else 0)
