"""A run directory has one owner: whoever comes second is told so, a dead owner's place is taken, by one alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ministral_jax.errors import UserError
from ministral_jax.runs import lock
from ministral_jax.runs.lock import owned, owner

# Holds the directory for a moment; a counter that two at once would spoil. Refused when told so.
WORKER = """
import fcntl, os, random, sys, time
from pathlib import Path
def refuse(*_): raise OSError(38, "Function not implemented")
if sys.argv[2] == "refused":
    fcntl.flock = fcntl.lockf = refuse
from ministral_jax.errors import UserError
from ministral_jax.runs.lock import owned
run = Path(sys.argv[1])
try:
    with owned(run):
        inside = run / "inside"
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
        print("in", flush=True)
        time.sleep(float(sys.argv[3]))
        with (run / "work").open("a") as file:
            file.write("done\\n")
        inside.unlink()
except UserError as error:
    print(error)
    sys.exit(2)
"""


def start(run: Path, flock: str, seconds: float = 0.15) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, str(run), flock, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("flock", ["kept", "refused"])
def test_of_two_starts_at_random_moments_one_works_at_a_time(tmp_path, flock):
    chance, run, done = random.Random(7), tmp_path / "run", 0
    for _ in range(20):
        first = start(run, flock)
        time.sleep(chance.uniform(0, 0.5))
        second = start(run, flock)
        said = [process.communicate(timeout=60)[0] for process in (first, second)]
        codes = [first.returncode, second.returncode]
        assert codes.count(0) >= 1 and set(codes) <= {0, 2}, said
        for code, text in zip(codes, said, strict=True):
            assert code == 0 or "is being written by" in text
        done += codes.count(0)
        assert (run / "work").read_text() == "done\n" * done
    assert done < 40, "they never met"


def test_a_killed_owner_is_followed_by_one_of_those_who_wait(tmp_path):
    run = tmp_path / "run"
    dead = start(run, "kept", 60)
    assert dead.stdout is not None and dead.stdout.readline() == "in\n"
    refused = start(run, "kept")
    assert f"is being written by process {dead.pid} on" in refused.communicate(timeout=60)[0]
    assert owner(run) is not None
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert owner(run) is None
    (run / "inside").unlink()
    followers = [start(run, "kept", 1) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in followers]
    assert sorted(process.returncode for process in followers) == [0, 2, 2], said


def elsewhere(run: Path) -> Path:
    """The file of an owner on another machine."""
    with owned(run):
        pass
    path = run / ".owner" / "000001"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"left": False, "machine": ["another"], "host": "far"}))
    return path


def test_an_owner_elsewhere_that_gives_signs_of_life_keeps_its_run(tmp_path, monkeypatch):
    path = elsewhere(tmp_path)
    monkeypatch.setattr(lock, "SILENT_SECONDS", 5.0)
    beat = subprocess.Popen(
        [sys.executable, "-c", f"import os, time\nwhile True: os.utime({str(path)!r}); time.sleep(.1)"]
    )
    try:
        with pytest.raises(UserError, match=r"is being written by process .* on far"), owned(tmp_path):
            pass
    finally:
        beat.kill()
        beat.wait()


def test_an_owner_elsewhere_that_falls_silent_is_followed(tmp_path, monkeypatch, capsys):
    elsewhere(tmp_path)
    monkeypatch.setattr(lock, "SILENT_SECONDS", 0.3)
    with owned(tmp_path):
        said = owner(tmp_path)
        assert said is not None and said["pid"] == os.getpid()
    assert "waiting for a sign of life from far" in capsys.readouterr().err


def test_a_number_that_another_process_has_now_is_not_the_owner(tmp_path):
    with owned(tmp_path):
        pass
    path = tmp_path / ".owner" / "000001"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"left": False, "begun": "1"}))
    with owned(tmp_path):
        pass


def test_who_was_taken_for_dead_ends_before_it_does_harm(tmp_path):
    program = """
import sys, time
from pathlib import Path
from ministral_jax.runs import lock
lock.BEAT_SECONDS = 0.1
with lock.owned(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""
    held = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert held.stdout is not None and held.stdout.readline() == "in\n"
    (tmp_path / ".owner" / "000002").write_text(json.dumps({"pid": 1, "host": "far", "since": "now"}))
    assert "is being written by process 1 on far" in held.communicate(timeout=30)[1]
    assert held.returncode == 75


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be a run's directory: .*file"), owned(tmp_path / "file"):
        pass
