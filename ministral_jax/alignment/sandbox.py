"""Runs a Python program that nobody has read, in a process of its own that can do little.

With `isolation="namespaces"` (Linux, unprivileged user namespaces, kernel 5.12 or later): no network; every file
read-only but for an empty directory of 16 MiB that vanishes; no devices; no sight of other processes; at most 32
threads; what it leaves running is killed with its PID namespace. It can still read files that its user can read, and
print them into an output that is compared and dropped. With `"none"`, for jobs that run inside a sandbox already, only
resource limits, time, the size of the output and the killing of its processes remain.

A program written to fool the check that shares its process could still find a way: there a test is what a test of
untrusted code can be. Tests by input and output do not share a process with it.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

Isolation = Literal["namespaces", "none"]

_GRACE_SECONDS = 10


class Outcome(NamedTuple):
    """How a program ended.

    ended: `exit`, `signal`, or the limit that ended it: `time`, `processes`, `memory`, `output`.
    code: exit code, negative for a signal.
    output: what it printed, at most 1 MiB.
    checked: whether its check ran to the end.
    """

    ended: Literal["exit", "signal", "time", "processes", "memory", "output"]
    code: int
    output: str
    checked: bool


class SandboxError(RuntimeError):
    """The sandbox itself could not be made or did not answer: nothing is known about the program."""


def run(
    program: str, *, stdin: str = "", check: str | None = None, seconds: float, memory_mb: int, isolation: Isolation
) -> Outcome:
    """Runs a program with `stdin`, or, with `check`, as a module, and then `check` in its namespace.

    seconds: of wall-clock time, the interpreter's start included. memory_mb: MiB of address space of each process, and
    of memory of all of them together.

    Raises:
        SandboxError: no sandbox on this machine, or one that does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="program-") as work:
        request = dict(
            program=program,
            name="__main__" if check is None else "program",
            check=check,
            token=secrets.token_hex(16),
            stdin=stdin,
            seconds=seconds,
            memory_mb=memory_mb,
            isolation=isolation,
            work=work,
            parent=os.getpid(),
        )
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("sandbox_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=work,
            env={"LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            said, error = child.communicate(json.dumps(request).encode(), timeout=seconds + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            raise SandboxError(f"it did not answer within {seconds + _GRACE_SECONDS:g} s") from None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
    if not said:
        lines = error.decode(errors="replace").strip().splitlines() or [f"exit code {child.returncode}"]
        raise SandboxError(f"it ended without a result ({lines[-1]})")
    result = json.loads(said)
    if "refused" in result:
        raise SandboxError(result["refused"])
    return Outcome(**result)


@cache
def refusal(isolation: Isolation) -> str | None:
    """Why no program can be run so on this machine; None if it can."""
    if sys.platform != "linux":
        return f"it needs Linux, this is {sys.platform}"
    try:
        outcome = run("print('ready')", seconds=20, memory_mb=512, isolation=isolation)
    except (SandboxError, OSError) as error:
        return str(error)
    return None if outcome.output == "ready\n" else f"a program that prints a word ended by {outcome.ended}"
