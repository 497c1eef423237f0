"""`launch local`: processes that end together, one exit code, no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_cases import RECIPE

from ministral_jax.cli import main
from ministral_jax.launching import local

# argv: index, folder, what to do. Notes its process id, and that of a child it leaves behind.
WORKER = """
import os, signal, subprocess, sys, time
from pathlib import Path
index, folder, do = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
def stop(signum, frame):
    (folder / f"asked-{index}").write_text(str(signum))
    sys.exit(75)
signal.signal(signal.SIGTERM, signal.SIG_IGN if do == "deaf" else stop)
child = subprocess.Popen(["sleep", "300"]).pid if do == "deaf" else 0
(folder / f"begun-{index}.new").write_text(f"{os.getpid()} {child}")
os.rename(folder / f"begun-{index}.new", folder / f"begun-{index}")
if do == "die":
    while len(list(folder.glob("begun-?"))) < 3: time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(300)
"""
LAUNCHER = """
import os, sys
from ministral_jax.launching.local import supervise
worker, folder, restarts = sys.argv[1:]
words = lambda i, port: [sys.executable, "-c", worker, str(i), folder, "listen"]
sys.exit(supervise(words, 2, int(restarts), dict(os.environ)))
"""


def words(index: int, folder: Path, do: str) -> list[str]:
    return [sys.executable, "-c", WORKER, str(index), str(folder), do]


def within(seconds: float, ready) -> bool:
    deadline = time.monotonic() + seconds
    while not (done := ready()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return done


def ids(folder: Path, count: int) -> list[int]:
    """Process ids of all workers, and of their children, once they have noted them."""
    assert within(60, lambda: len(list(folder.glob("begun-?"))) == count)
    return [int(word) for path in folder.glob("begun-?") for word in path.read_text().split() if word != "0"]


def gone(pids: list[int]) -> bool:
    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return within(10, lambda: not any(map(alive, pids)))


def test_when_one_is_killed_all_are_gone_and_the_job_may_be_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "PATIENCE", 1.0)
    begun = time.monotonic()
    code = local.supervise(lambda i, port: words(i, tmp_path, "die" if i == 1 else "deaf"), 3, 0, dict(os.environ))
    assert code == 75 and time.monotonic() - begun < 100  # they would sleep for 300
    pids = ids(tmp_path, 3)
    assert len(pids) == 5 and gone(pids)


@pytest.mark.parametrize(
    "signum",
    [
        *[signal.SIGTERM, signal.SIGINT],
        pytest.param(signal.SIGKILL, marks=pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")),
    ],
)
def test_no_process_outlives_its_launcher_and_a_signal_ends_the_restarts(tmp_path, signum):
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen([sys.executable, "-c", LAUNCHER, WORKER, str(tmp_path), "3"], stderr=said)
    pids = ids(tmp_path, 2)
    process.send_signal(signum)
    # Python's KeyboardInterrupt ends the stand-ins by the signal itself
    assert process.wait(30) == {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[signum]
    assert gone(pids) and "started again" not in (tmp_path / "said").read_text()
    asked = {path.name for path in tmp_path.glob("asked-*")}
    assert asked == ({"asked-0", "asked-1"} if signum == signal.SIGTERM else set())


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        *[([0, 0], 0), ([0, 75], 75), ([-9, 75], 75), ([137, 0], 75), ([1, 75], 1), ([1, -9], 75)],
        *[([75, 2], 2), ([-15, 2], 2), ([0, 3, 1], 3), ([130, 130], 130), ([-2, -2], 130), ([], 0)],
    ],
)
def test_one_exit_code(codes, code):
    assert local.outcome(codes) == code


def test_a_fault_is_not_hidden_by_the_end_of_those_that_waited(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "PATIENCE", 0.5)
    fault = [sys.executable, "-c", "raise SystemExit(1)"]
    assert local.supervise(lambda i, port: fault if i == 0 else words(i, tmp_path, "deaf"), 2, 3, dict(os.environ)) == 1


@pytest.mark.parametrize(("restarts", "starts", "code"), [(0, 1, 75), (1, 2, 75), (2, 3, 0), (9, 3, 0)])
def test_75_is_started_again_as_often_as_allowed(tmp_path, capfd, restarts, starts, code):
    """The third start succeeds. Each has a port of its own; what process 1 says is marked."""
    script = (
        "import sys; from pathlib import Path; p = Path(sys.argv[1]); p.open('a').write(sys.argv[2] + '\\n');"
        "print('here', file=sys.stderr); sys.exit(75 if len(p.read_text().splitlines()) < 3 else 0)"
    )
    paths = [tmp_path / "0", tmp_path / "1"]
    worker = lambda i, port: [sys.executable, "-c", script, str(paths[i]), str(port)]
    assert local.supervise(worker, 2, restarts, dict(os.environ)) == code
    ports = [path.read_text().split() for path in paths]
    assert ports[0] == ports[1] and len(ports[0]) == starts
    said = [line for line in capfd.readouterr().err.splitlines() if line.endswith("here")]
    assert sorted(said) == ["[1] here"] * starts + ["here"] * starts


def test_the_processes_know_their_places(monkeypatch):
    seen = {}
    monkeypatch.setattr(local, "supervise", lambda worker, *rest: seen.update(worker=worker, rest=rest) or 7)
    arguments = ["launch", "local", RECIPE, "parent", "launch.local={processes: 3, cpu_devices: 2, restarts: 1}"]
    assert main([*arguments, "--run-dir", "/r"]) == 7
    assert seen["worker"](2, 4321) == [
        *[sys.executable, "-m", "ministral_jax", "run", RECIPE, "parent", "--run-dir", "/r", "--cpu-devices", "2"],
        *["--coordinator", "127.0.0.1:4321", "--process-count", "3", "--process-index", "2"],
    ]
    assert seen["rest"][:2] == (3, 1)
    assert main(["launch", "local", RECIPE, "launch.local.processes=1"]) == 7
    assert seen["worker"](0, 4321) == [sys.executable, "-m", "ministral_jax", "run", RECIPE]
