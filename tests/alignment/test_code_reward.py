"""Programs that pass, fail, and try to get out."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from ministral_jax.alignment import code_reward as module
from ministral_jax.alignment import sandbox
from ministral_jax.alignment.answer import Sample
from ministral_jax.alignment.code_reward import check_sandbox, check_tests, code_reward, program_of
from ministral_jax.alignment.rewards import CodeReward, RewardsConfig
from ministral_jax.alignment.sandbox import refusal, run
from ministral_jax.alignment.scoring import Scorer
from ministral_jax.errors import UserError

SUM = "a, b = map(int, input().split())\nprint(a + b)"
SUM_TESTS = [{"input": "1 2\n", "output": "3"}, {"input": "-5 5", "output": "0\n"}]
SQUARE = "def f(x):\n    return x * x"

missing = refusal("bubblewrap")
ISOLATION = "none" if missing else "bubblewrap"
both = pytest.mark.parametrize("isolation", ["bubblewrap", "none"], indirect=True)


@pytest.fixture
def isolation(request):
    """Bubblewrap unless said otherwise; what only it does cannot be tested without it."""
    wanted = getattr(request, "param", "bubblewrap")
    if wanted == "bubblewrap" and missing:
        pytest.fail(f"this test needs the package bubblewrap and a kernel that lets it work: {missing}")
    return wanted


def settings(**given):
    rewards = {"code": {"enabled": True, "isolation": ISOLATION, "seconds": 20, **given}}
    return TypeAdapter(RewardsConfig).validate_python(rewards)["code"]


def sample(answer, tests):
    return Sample((), answer, None, answer, (1,), "stop", False, {"tests": tests}, "rows.jsonl:3", 64)


def ended(program, isolation, **given):
    return run(textwrap.dedent(program), **{"seconds": 20, "memory_mb": 300, "isolation": isolation, **given})


def processes_with(mark):
    """Processes of this machine that have `mark` among their arguments."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


def becomes(there, mark, seconds=60.0):
    """Whether processes with `mark` come, or go, in time."""
    end = time.monotonic() + seconds
    while bool(processes_with(mark)) != there and time.monotonic() < end:
        time.sleep(0.02)
    return bool(processes_with(mark)) == there


@pytest.mark.parametrize(
    ("answer", "tests", "expected"),
    [
        (f"Here it is:\n```python\n{SUM}\n```\nIt adds.", SUM_TESTS, 1),
        (SUM.replace("+", "-"), SUM_TESTS, 0),
        (f"```python\n{SUM}\n```\nor\n```\nprint(3)\n```\n", SUM_TESTS, 0),
        (SUM + "\nraise SystemExit(1)", SUM_TESTS, 0),
        ("print(3", SUM_TESTS, 0),
        ("", SUM_TESTS, 0),
        ("", [{"input": "", "output": ""}], 0),
        ("x = '\udc80'", SUM_TESTS, 0),
        (SQUARE, [{"assert": "assert f(3) == 9"}, {"assert": "for n in range(9):\n  assert f(n) >= n"}], 1),
        (SQUARE, [{"assert": "assert f(3) == 9"}, {"assert": "assert f(3) == 8"}], 0),
        ("import os\nos._exit(0)", [{"assert": "assert f(3) == 9"}], 0),
        ("raise SystemExit(0)", [{"assert": "assert f(3) == 9"}], 0),
    ],
)
def test_programs(answer, tests, expected):
    assert code_reward(sample(answer, tests), settings()) == expected


def test_the_last_block_is_the_program():
    assert program_of("a\n```py\nx\n```\n```\ny\nz\n```\nb") == "y\nz\n"
    assert program_of("x = '``` no block'") == "x = '``` no block'"


def test_it_is_off_unless_asked():
    with Scorer({"code": CodeReward()}, workers=1) as scorer, pytest.raises(UserError, match="enabled: true"):
        scorer.check({"tests": SUM_TESTS}, "rows.jsonl:3")
    with pytest.raises(UserError, match="enabled: true"):
        code_reward(sample(SUM, SUM_TESTS), CodeReward())


@pytest.mark.parametrize(
    ("bwrap", "said"),
    [
        (None, "bwrap is not installed"),
        ("echo bwrap: No permissions to create new namespace >&2; exit 1", "bwrap: No permissions to create new name"),
        ("exit 3", r"it did not start \(exit code 3\)"),
        ("exec sleep 60", r"it did not start \(exit code -9\)"),
    ],
)
def test_without_a_sandbox_it_refuses_and_gives_no_zero(monkeypatch, tmp_path, bwrap, said):
    if bwrap is not None:
        (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{bwrap}\n")
        (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sandbox, "_START_SECONDS", 0.2)
    monkeypatch.setattr(module, "refusal", refusal.__wrapped__)
    wanted = CodeReward(enabled=True)
    with pytest.raises(UserError, match=rf"\({said}.*\); it needs the package bubblewrap.* `isolation: none`$"):
        check_sandbox(wanted)
    with pytest.raises(sandbox.SandboxError, match=said):
        code_reward(sample(SUM, SUM_TESTS), wanted)


@pytest.mark.parametrize(
    "tests",
    [
        None,
        [],
        SUM_TESTS * 11,
        ["assert f(1)"],
        [{"input": "1"}],
        [{"input": "1", "output": 1}],
        [{"assert": "assert f(1) =="}],
    ],
)
def test_rows_without_proper_tests_are_refused(tests):
    with pytest.raises(UserError, match=r"^rows\.jsonl:3: "):
        check_tests({"tests": tests}, "rows.jsonl:3")


@both
@pytest.mark.parametrize(
    ("limit", "program", "given"),
    [
        ("time", "while True: pass", {"seconds": 0.5}),
        ("time", "import time; time.sleep(60)", {"seconds": 0.5}),
        ("output", "while True: print('x' * 10**6)", {}),
        ("processes", "for _ in range(60): os.fork() or time.sleep(60)\ntime.sleep(60)", {}),
        ("processes", "for _ in range(60): threading.Thread(target=time.sleep, args=(60,)).start()", {}),
        (
            "memory",
            "for _ in range(5): os.fork() or (x := bytearray(80 << 20)) and time.sleep(60)\ntime.sleep(60)",
            {"memory_mb": 200},
        ),
    ],
)
def test_limits_that_end_a_program(isolation, limit, program, given):
    outcome = ended(f"import os, threading, time\nthreading.stack_size(65536)\n{program}", isolation, **given)
    assert outcome.ended == limit and len(outcome.output) == (1 << 20 if limit == "output" else 0)


@both
def test_limits_that_a_program_sees(isolation):
    hog = ended("try:\n    x = bytearray(10**9)\nexcept MemoryError:\n    print('refused')", isolation)
    assert hog.output == "refused\n"
    written = ended("open('f', 'wb').write(b'x' * 10**8)", isolation)
    assert (written.ended, written.code) != ("exit", 0)
    plain = ended("import os, sys; print(sorted(os.environ), os.listdir('.'), sys.flags.isolated)", isolation)
    assert plain.output.split("] ")[1] == "[" and "PATH" in plain.output and "JAX" not in plain.output
    tame = "import os, time\nfor _ in range(4):\n    if os.fork() == 0: os._exit(0)\ntime.sleep(0.2)\nprint('done')"
    assert ended(tame, isolation)[:3] == ("exit", 0, "done\n")


@both
def test_what_it_leaves_running_is_killed(isolation):
    mark = f"left-{isolation}-{os.getpid()}"
    program = f"""
        import os, subprocess, sys
        sleeper = "import sys, time; print('up', flush=True); time.sleep(600)"
        for own_session in (False, True):
            child = subprocess.Popen([sys.executable, "-S", "-c", sleeper, "{mark}"], stdout=subprocess.PIPE,
                                     start_new_session=own_session)
            print(child.stdout.readline().decode().strip())
    """
    assert ended(program, isolation).output == "up\nup\n"
    assert becomes(False, mark, seconds=5)


def test_no_network_no_files_no_other_processes(isolation, tmp_path):
    target = tmp_path / "file"
    target.write_text("before")
    attempts = {
        "a file of the user": f"open({str(target)!r})",
        "a file in its place": f"open({str(target)!r}, 'w')",
        "a file of the system": "open('/usr/x', 'w')",
        "a file anywhere": "open('/x', 'w')",
        "another process": f"os.kill({os.getpid()}, 0)",
        "processes": "os.listdir('/proc')",
        "a device": "open('/dev/zero')",
        "another user": "os.setuid(0)",
        "more than 16 MiB": "[open(f'f{n}', 'wb').write(b'x' * 10**6) for n in range(40)]",
    }
    with socket.create_server(("127.0.0.1", 0)) as server:
        attempts["the network"] = f"socket.create_connection({server.getsockname()!r}, timeout=5)"
        assert ended(f"import socket; {attempts['the network']}; print('connected')", "none").output == "connected\n"
        program = f"""
            import ctypes, os, socket
            for what, attempt in {attempts!r}.items():
                try:
                    print(what, eval(attempt))
                except OSError:
                    pass
            print(os.getuid() != 0, ctypes.CDLL(None).unshare(0x10000000))  # no namespace of users of its own
            os.system("rm f*")
            open("own", "w").write("fine")
            open(os.devnull, "w").write("fine")
            print(open("own").read())
        """
        assert ended(program, isolation).output == "True -1\nfine\n"
    assert target.read_text() == "before"


@both
def test_it_ends_with_the_process_that_asked_for_it(isolation):
    """As when a worker of the pool is killed; with bubblewrap all that the program has started too."""
    mark = f"orphan-{isolation}-{os.getpid()}"
    words = f"[sys.executable, '-S', '-c', 'import time; time.sleep(600)', {mark!r}]"
    start = f"subprocess.run({words})" if isolation == "bubblewrap" else f"os.execv(sys.executable, {words})"
    given = f"{f'import os, subprocess, sys; {start}'!r}, seconds=60, memory_mb=300, isolation={isolation!r}"
    code = f"from ministral_jax.alignment import sandbox; sandbox.run({given})"
    asking = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert becomes(True, mark)
    finally:
        asking.kill()
        asking.wait()
    assert becomes(False, mark, seconds=20)


def test_scored_in_workers():
    with Scorer({"code": settings()}, workers=2) as scorer:
        scorer.check({"tests": SUM_TESTS}, "rows.jsonl:3")
        assert scorer.score([sample(SUM, SUM_TESTS), sample("print(3)", SUM_TESTS)]).total.tolist() == [1, 0]
