"""Programs that pass, fail, and try to get out."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ministral_jax.alignment import code_reward as module
from ministral_jax.alignment import sandbox
from ministral_jax.alignment.code_reward import check_code, check_tests, code_reward, program_of
from ministral_jax.alignment.rewards import CodeReward
from ministral_jax.alignment.sample import Sample
from ministral_jax.alignment.sandbox import refusal, run
from ministral_jax.alignment.scoring import Scorer
from ministral_jax.errors import UserError

SUM = "a, b = map(int, input().split())\nprint(a + b)"
SUM_TESTS = [{"input": "1 2\n", "output": "3"}, {"input": "-5 5", "output": "0\n"}]

without_namespaces = refusal("namespaces")
namespaces = pytest.mark.skipif(without_namespaces is not None, reason=f"no sandbox here: {without_namespaces}")
ISOLATION = "none" if without_namespaces else "namespaces"


def settings(**given):
    return CodeReward(**{"enabled": True, "isolation": ISOLATION, "seconds": 20, "compile_seconds": 20, **given})


def sample(answer, tests):
    return Sample((), answer, None, answer, (1,), "stop", False, {"tests": tests}, "rows.jsonl:3", 64)


def ended(program, isolation=ISOLATION, **given):
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


def gone(mark, seconds=20.0):
    end = time.monotonic() + seconds
    while processes_with(mark) and time.monotonic() < end:
        time.sleep(0.02)
    return not processes_with(mark)


@pytest.mark.parametrize(
    ("answer", "tests", "expected"),
    [
        (f"Here it is:\n```python\n{SUM}\n```\nIt adds.", SUM_TESTS, 1),
        (SUM.replace("+", "-"), SUM_TESTS, 0),
        (f"```python\n{SUM}\n```\nor\n```\nprint(3)\n```\n", SUM_TESTS, 0),
        (SUM + "\nraise SystemExit(1)", SUM_TESTS, 0),
        ("print(3", SUM_TESTS, 0),
        ("", SUM_TESTS, 0),
        ("x = '\udc80'", SUM_TESTS, 0),
        (
            "def f(x):\n    return x * x",
            [{"assert": "assert f(3) == 9"}, {"assert": "for n in range(9):\n  assert f(n) >= n"}],
            1,
        ),
        ("def f(x):\n    return x * x", [{"assert": "assert f(3) == 9"}, {"assert": "assert f(3) == 8"}], 0),
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


def test_without_a_sandbox_it_refuses(monkeypatch):
    monkeypatch.setattr(module, "refusal", lambda isolation: "unshare: Operation not permitted")
    with pytest.raises(UserError, match=r"\(unshare: Operation not permitted\); it needs Linux .* `isolation: none`"):
        check_code(CodeReward(enabled=True))


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
        check_tests({"tests": tests}, CodeReward(), "rows.jsonl:3")


@pytest.mark.parametrize("isolation", [pytest.param("namespaces", marks=namespaces), "none"])
def test_limits(isolation):
    assert ended("while True: pass", isolation, seconds=0.5).ended == "time"
    assert ended("import time; time.sleep(60)", isolation, seconds=0.5).ended == "time"
    hog = ended("try:\n    x = bytearray(10**9)\nexcept MemoryError:\n    print('refused')", isolation)
    assert hog.output == "refused\n"
    loud = ended("while True: print('x' * 10**6)", isolation)
    assert loud.ended == "output" and len(loud.output) == 1 << 20
    written = ended("open('f', 'wb').write(b'x' * 10**8)", isolation)
    assert (written.ended, written.code) != ("exit", 0)
    plain = ended("import os, sys; print(sorted(os.environ), os.listdir('.'), sys.flags.isolated)", isolation)
    assert plain.output.split("] ")[1] == "[" and "PATH" in plain.output and "JAX" not in plain.output


@pytest.mark.parametrize("isolation", [pytest.param("namespaces", marks=namespaces), "none"])
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
    assert gone(mark, seconds=5)


@namespaces
def test_a_forker_is_bounded():
    tame = ended(
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0: os._exit(0)\ntime.sleep(0.2)\nprint('done')"
    )
    assert (tame.ended, tame.output) == ("exit", "done\n")
    forker = "import os, time\nfor _ in range(60):\n    if os.fork() == 0:\n        time.sleep(60)\ntime.sleep(60)"
    assert ended(forker).ended == "processes"
    threads = "import threading, time\nthreading.stack_size(65536)\nfor _ in range(60):\n"
    assert ended(threads + "    threading.Thread(target=time.sleep, args=(60,)).start()").ended == "processes"
    hungry = "import os, time\nfor _ in range(5):\n    os.fork() or (x := bytearray(80 << 20)) and time.sleep(60)\n"
    assert ended(hungry + "time.sleep(60)", memory_mb=200).ended == "memory"


@namespaces
def test_no_network_no_files_no_other_processes(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket; socket.create_connection({server.getsockname()!r}, timeout=5); print('connected')"
        assert ended(connect, "none").output == "connected\n"
        assert ended(connect).output == ""
    target = tmp_path / "file"
    target.write_text("before")
    ended(f"open({str(target)!r}, 'w').write('after')")
    assert target.read_text() == "before"
    out = ended(
        f"""
        import os
        print([p for p in os.listdir("/proc") if p.isdigit()], os.getuid() != 0, os.path.exists("/proc/{os.getpid()}"))
        for attempt in (
            lambda: open("/proc/sys/kernel/domainname", "w"),
            lambda: os.kill({os.getpid()}, 0),
            lambda: open("/proc/1/mem", "rb"),
            lambda: os.open("/dev/zero", os.O_RDONLY),
            lambda: os.setuid(0),
        ):
            try:
                print(attempt())
            except OSError as error:
                print(type(error).__name__)
        open("own", "w").write("fine")
        open(os.devnull, "w").write("fine")
        print(open("own").read())
        """
    )
    lines = out.output.splitlines()
    assert lines[0] == "['1', '2'] True False" and lines[-1] == "fine" and len(lines) == 7
    assert set(lines[1:-1]) <= {"OSError", "PermissionError", "ProcessLookupError"}


@namespaces
def test_it_ends_with_the_process_that_asked_for_it():
    """As when a worker of the pool is killed."""
    mark = f"orphan-{os.getpid()}"
    child = "import time; time.sleep(600)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}, {mark!r}])"
    given = f"{program!r}, seconds=60, memory_mb=300, isolation='namespaces'"
    asking = subprocess.Popen(
        [sys.executable, "-c", f"from ministral_jax.alignment import sandbox; sandbox.run({given})"]
    )
    try:
        end = time.monotonic() + 60
        while not processes_with(mark) and time.monotonic() < end:
            time.sleep(0.05)
        assert processes_with(mark)
    finally:
        asking.kill()
        asking.wait()
    assert gone(mark)


def test_a_sandbox_that_fails_is_no_zero(monkeypatch, tmp_path):
    broken = tmp_path / "sandbox_child.py"
    broken.write_text("raise SystemExit('no disk')")
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    with pytest.raises(sandbox.SandboxError, match="no disk"):
        code_reward(sample(SUM, SUM_TESTS), settings())


def test_scored_in_workers():
    tests = {"tests": SUM_TESTS}
    samples = [sample(SUM, SUM_TESTS), sample("print(3)", SUM_TESTS)]
    with Scorer({"code": settings()}, workers=2) as scorer:
        scorer.check(tests, "rows.jsonl:3")
        assert scorer.score(samples).total.tolist() == [1, 0]
