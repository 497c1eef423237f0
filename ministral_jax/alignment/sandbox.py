"""Runs a Python program that nobody has read, in a process of its own that can do little.

With `isolation="bubblewrap"` (its command `bwrap`, for any user): no network, no devices, no sight of other processes,
and no files but the interpreter's and the system's libraries, read-only, and an empty directory of 16 MiB, which
vanishes. With `"none"`, for jobs that run inside a sandbox already, it sees what its user sees. Either way there are
limits of time, memory, threads, output and the size of a file, and no environment; what it leaves running is killed,
and so is the program when the process that asked for it dies.

A program written to fool the check that shares its process could still find a way: there a test is what a test of
untrusted code can be. Tests by input and output do not share a process with it.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import IO, Literal, NamedTuple

Isolation = Literal["bubblewrap", "none"]
Ended = Literal["exit", "time", "processes", "memory", "output"]

_OUTPUT_BYTES = 1 << 20
_FILE_BYTES = 16 << 20
_THREADS = 32
_OPEN_FILES = 64
_POLL_SECONDS = 0.02
_START_SECONDS = 10

_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
_APART = ("--unshare-user", "--disable-userns", "--unshare-all", "--die-with-parent", "--uid", "1000", "--gid", "1000")
_TOGETHER = ("--no-new-privs", "--pdeathsig", "KILL")

_BOOT = """
import json, os, resource, sys
task, report = map(int, sys.argv[1:])
del sys.argv[1:]
with open(task) as source:
    task = json.load(source)
for name, limit in task["limits"].items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
os.write(report, b"started")
space = {"__name__": task["name"]}
exec(compile(task["program"], "<program>", "exec"), space)
if task["check"] is not None:
    exec(compile(task["check"], "<test>", "exec"), space)
    os.write(report, task["token"].encode())
"""


class Outcome(NamedTuple):
    """How a program ended.

    ended: `exit`, or the limit that ended it: `time`, `processes`, `memory`, `output`.
    code: exit code; that of a signal is no exit code of a program: negative, or 128 and more.
    output: what it printed, at most 1 MiB.
    checked: whether its check ran to the end.
    """

    ended: Ended
    code: int
    output: str
    checked: bool


class SandboxError(RuntimeError):
    """The sandbox itself could not be made or did not answer: nothing is known about the program."""


def run(
    program: str, *, stdin: str = "", check: str | None = None, seconds: float, memory_mb: int, isolation: Isolation
) -> Outcome:
    """Runs a program with `stdin`, or, with `check`, as a module, and then `check` in its namespace.

    seconds: of wall-clock time. memory_mb: MiB of address space of each process, and of memory of all of them together.

    Raises:
        SandboxError: no sandbox on this machine, or one that does not answer.
    """
    memory = memory_mb << 20
    limits = dict(CPU=int(seconds) + 2, AS=memory, FSIZE=_FILE_BYTES, NOFILE=_OPEN_FILES, CORE=0)
    name, token = "__main__" if check is None else "program", secrets.token_hex(16)
    task = dict(program=program, name=name, check=check, token=token, limits=limits)
    with ExitStack() as stack:
        work = stack.enter_context(tempfile.TemporaryDirectory(prefix="program-"))
        # Files, which nobody has to read while it runs; but a pipe for the report, where nothing can be taken back.
        given, task_file, output, errors = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(4))
        os.pwrite(given.fileno(), stdin.encode(), 0)
        os.pwrite(task_file.fileno(), json.dumps(task).encode(), 0)
        report, end = os.pipe()
        stack.callback(os.close, report)
        stack.callback(os.close, end)
        passed = task_file.fileno(), end
        process = subprocess.Popen(
            _command(work, isolation, passed),
            stdin=given,
            stdout=output,
            stderr=errors,
            pass_fds=passed,
            cwd=work,
            env={"HOME": work, "TMPDIR": work, "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"},
            start_new_session=True,
        )
        try:
            ended = _watch(process, report, output, seconds, memory)
        finally:
            _end(process, work, isolation)
        if not _readable(report):
            lines = _content(errors).decode(errors="replace").strip().splitlines()
            raise SandboxError(lines[-1] if lines else f"it did not start (exit code {process.returncode})")
        checked = ended == "exit" and os.read(report, 64) == b"started" + token.encode()
        return Outcome(ended, process.returncode, _content(output).decode(errors="replace"), checked)


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


def _command(work: str, isolation: Isolation, files: tuple[int, int]) -> list[str]:
    """The interpreter alone, without the packages of an environment, inside the sandbox."""
    python = f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    command = [python, "-I", "-S", "-B", "-X", "utf8", "-c", _BOOT, *map(str, files)]
    if isolation == "none":
        return [_found("setpriv"), *_TOGETHER, *command]
    visible = [word for path in (*_SYSTEM, sys.base_prefix) for word in ("--ro-bind-try", path, path)]
    own = ["--dev-bind", "/dev/null", "/dev/null", "--size", str(_FILE_BYTES), "--tmpfs", work, "--chdir", work]
    return [_found("bwrap"), *_APART, *visible, *own, "--remount-ro", "/", *command]


def _found(name: str) -> str:
    if (path := shutil.which(name)) is None:
        raise SandboxError(f"{name} is not installed")
    return path


def _content(file: IO[bytes]) -> bytes:
    return os.pread(file.fileno(), _OUTPUT_BYTES, 0)  # the program has the same position in the file


def _readable(pipe: int) -> bool:
    return bool(select.select([pipe], [], [], 0)[0])


def _watch(process: subprocess.Popen[bytes], report: int, output: IO[bytes], seconds: float, memory: int) -> Ended:
    deadline, started = time.monotonic() + _START_SECONDS, False
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_SECONDS)
        if not started and _readable(report):
            deadline, started = time.monotonic() + seconds, True
        if os.fstat(output.fileno()).st_size > _OUTPUT_BYTES:
            return "output"
        if process.returncode is not None:
            return "exit"
        if time.monotonic() > deadline:
            return "time"
        threads, used = _usage(process.pid)
        if threads > _THREADS or used > memory:
            return "processes" if threads > _THREADS else "memory"


def _usage(pid: int) -> tuple[int, int]:
    """Threads, and bytes of memory of their own, of a process and all below it; from outside, where no program can lie.

    RLIMIT_NPROC would not do: it does not hold for root, and before Linux 5.14 it counts all that a user runs.
    """
    threads = memory = 0
    waiting = [pid]
    while waiting and threads <= _THREADS:
        with suppress(OSError):  # it has just ended
            process = Path(f"/proc/{waiting.pop()}")
            _, resident, shared, *_ = map(int, (process / "statm").read_text().split())
            memory += (resident - shared) * os.sysconf("SC_PAGE_SIZE")
            for task in (process / "task").iterdir():
                threads += 1
                waiting += map(int, (task / "children").read_text().split())
    return threads, memory


def _end(process: subprocess.Popen[bytes], work: str, isolation: Isolation) -> None:
    """Kills what is left: the kernel all in the namespace, without one those that have the program's environment."""
    if process.poll() is None:
        process.kill()
        process.wait()
    mark, left = f"HOME={work}".encode(), isolation == "none"
    while left:
        left = False
        for file in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in file.read_bytes().split(b"\0"):
                    left = True
                    os.kill(int(file.parent.name), signal.SIGKILL)
