"""Jobs of several processes on this machine: started, watched, harmed, and gone when the test is over."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import worker
from compiling import SIMPLE_LOOPS
from harm_cases import free_port

from ministral_jax.stages.base import load_stage

RECIPE = Path(__file__).parent.parent / "chaos" / "chaos.yaml"
TRAINED = ("parent", "pruned", "short")
POST = Path(__file__).parent.parent / "micro_post.yaml"
POST_TRAINED = ("parent", "sft", "reward", "instruct", "rl")
RETRY = 75
PATIENCE = 600
SEED = int(os.environ.get("CHAOS_SEED", "7"))
VICTIMS = ([0], [1], [0, 1])
GONE = 15
"""Seconds in which a process ends whose peer has died."""
# Programs that any job has compiled, of this session or another. Nobody needs fast ones.
COMPILED = Path(tempfile.gettempdir()) / "ministral_jax_test_cache" / "jobs"
COMPILING = {
    "JAX_PLATFORMS": "cpu",
    "PYTHONUNBUFFERED": "1",
    "OPENBLAS_NUM_THREADS": "1",  # the others would be there before the fork
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": f"{SIMPLE_LOOPS}--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["pytest", "worker", "preload"])


def forked(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that does `work` and leads a process group, of one that has imported everything: that takes a process
    seconds, and a test many of them. Those of the tests of `launching` and of SLURM are started as users start them.
    """
    before = {**os.environ}
    paths = [str(POST.parent), str(Path(__file__).parent), *filter(None, [before.get("PYTHONPATH")])]
    os.environ.update(COMPILING, PYTHONPATH=os.pathsep.join(paths))
    try:
        process = FORKING.Process(target=work, args=arguments)
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    with suppress(ProcessLookupError):  # it has already ended
        while os.getpgid(process.pid) != process.pid:
            time.sleep(0.001)
    return process


class Job:
    """Processes `0 .. count - 1` of one job. Logs and journals lie beside the run directory and outlive it."""

    def __init__(
        self,
        run_dir: Path,
        count: int = 2,
        devices: int = 1,
        *words: str,
        recipe: Path = RECIPE,
        faults: Sequence[str] = (),
        pace: float = 0,
    ):
        self.run_dir, self.begun = run_dir, time.time()
        if not (run_dir / "xla").exists():
            run_dir.mkdir(parents=True, exist_ok=True)
            COMPILED.mkdir(parents=True, exist_ok=True)
            (run_dir / "xla").symlink_to(COMPILED)
        port = free_port()
        attempt = len(list(run_dir.parent.glob(f"{run_dir.name}.*.0.log")))
        self.logs = [run_dir.with_name(f"{run_dir.name}.{attempt}.{i}.log") for i in range(count)]
        self.journals = [log.with_suffix(".journal") for log in self.logs]
        self._read: list[tuple[int, list[tuple[float, str]]]] = [(0, []) for _ in self.logs]
        shared = [str(recipe), *words, "--run-dir", str(run_dir), "--cpu-devices", str(devices)]
        if count > 1:
            shared += ["--coordinator", f"127.0.0.1:{port}", "--process-count", str(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            log.touch()
            mine = ["run", *shared, *(["--process-index", str(i)] if count > 1 else [])]
            fault = faults[i] if i < len(faults) else ""
            self.processes.append(forked(worker.work, mine, str(log), str(self.journals[i]), fault, pace))

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing that was started stays."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        assert all(gone(process.pid) for process in self.processes), "orphans"

    def send(self, number: signal.Signals, *indices: int) -> None:
        for i in indices:
            with suppress(ProcessLookupError):
                os.kill(self.processes[i].pid, number)

    def kill(self, victims: Sequence[int], seconds: float = GONE) -> list[int | None]:
        """Kill some processes; the others end in time, by a signal or asking to be run again. All exit codes."""
        self.send(signal.SIGKILL, *victims)
        others = {*range(len(self.processes))} - {*victims}
        codes = self.wait(seconds, *others)
        assert all(codes[i] == RETRY or codes[i] < 0 for i in others), f"{codes}\n{self.tails()}"
        return codes

    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def wait(self, seconds: float = PATIENCE, *indices: int) -> list[int | None]:
        """Exit codes, once these processes (all when none is named) have ended."""
        which = indices or range(len(self.processes))
        deadline = time.monotonic() + seconds
        while any(self.processes[i].exitcode is None for i in which):
            assert time.monotonic() < deadline, f"still there after {seconds} s: {self.codes()}\n{self.tails()}"
            time.sleep(0.02)
        return self.codes()

    def finish(self) -> None:
        codes = self.wait()
        assert set(codes) == {0}, f"{codes}\n{self.tails()}"

    def until(self, ready: Callable[[], Any], seconds: float = PATIENCE) -> bool:
        """Wait for `ready`; False when a process ended before that."""
        deadline = time.monotonic() + seconds
        while not ready():
            if any(code is not None for code in self.codes()):
                return False
            assert time.monotonic() < deadline, f"it never came to that\n{self.tails()}"
            time.sleep(0.005)
        return True

    def doing(self, index: int = 0) -> str:
        """What a process has last begun to do: stage, step, what."""
        moments = self.moments(index)
        return moments[-1][1] if moments else "starting"

    def has(self, pattern: str, index: int = 0) -> bool:
        """Whether a process has begun to do what matches: what it did since may have hidden it from `doing`."""
        return any(re.match(pattern, what) for _, what in self.moments(index))

    def moments(self, index: int = 0) -> list[tuple[float, str]]:
        """(seconds since the start, stage/step/what) of all that a process has begun to do."""
        size = self.journals[index].stat().st_size if self.journals[index].is_file() else 0
        if self._read[index][0] != size:  # asked for all the time, by a process that shares the machine with the job
            self._read[index] = size, self._moments(self.journals[index].read_text())
        return self._read[index][1]

    def _moments(self, text: str) -> list[tuple[float, str]]:
        stage, step, found = "", "", []
        for line in text.splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            at, _, what = line.rstrip("\n").partition(" ")
            if what.startswith("beginning "):
                stage, step = what.removeprefix("beginning "), ""
            elif match := re.fullmatch(r"step (\d+)", what):
                step = match[1]
            found.append((float(at) - self.begun, f"{stage}/{step}/{what}"))
        return found

    def log(self, index: int = 0) -> str:
        return self.logs[index].read_text(errors="replace")

    def tails(self) -> str:
        return "\n".join(
            f"---- {log.name}, doing {self.doing(i)}\n{self.log(i)[-3000:]}" for i, log in enumerate(self.logs)
        )


def gone(group: int, seconds: float = 5) -> bool:
    """Whether nothing of a process group is left, by itself and soon."""
    deadline = time.monotonic() + seconds
    while members(group):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def members(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(path.parent.name))
    return found


def copied(run_dir: Path, other: Path, *without: str) -> Path:
    """A run directory as another one is, without some of its stages."""
    return Path(shutil.copytree(other, run_dir, symlinks=True, ignore=shutil.ignore_patterns(*without)))


# ---- what a run left -------------------------------------------------------------------------------------------------


def records(run_dir: Path, stage: str, kind: str) -> list[dict[str, float]]:
    """Figures of a kind, without those that measure time."""
    path = run_dir / stage / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [{k: v for k, v in r.items() if "per_second" not in k} for r in found if r["kind"] == kind]


def answers(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    """What the model answered when the stage was last examined."""
    path = run_dir / stage / "answers.json"
    return json.loads(path.read_text())["answers"] if path.is_file() else []


def digests(root: Path) -> dict[str, str]:
    """Of every file below a directory."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def export(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run_dir / "hf" / "hf").iterdir())}


def assert_same_figures(
    ours: Path, theirs: Path, stages: Sequence[str], relative: float, absolute: float = 0.0
) -> float:
    """Every figure of every step, within a tolerance; the largest relative difference."""
    worst = 0.0
    for stage, kind in itertools.product(stages, ("train", "eval")):
        a, b = records(ours, stage, kind), records(theirs, stage, kind)
        assert [r["step"] for r in a] == [r["step"] for r in b] != [], (stage, kind)
        for x, y in zip(a, b, strict=True):
            assert x.keys() == y.keys()
            for key in x.keys() - {"kind", "step"}:
                worst = max(worst, abs(x[key] - y[key]) / max(abs(y[key]), 1e-9))
                message = f"{stage} {kind} {x['step']} {key}"
                np.testing.assert_allclose(x[key], y[key], rtol=relative, atol=absolute, err_msg=message)
    return worst


def assert_same_bits(ours: Path, theirs: Path, stages: Sequence[str] = TRAINED) -> None:
    """Parameters of every stage, every figure of every step, the last answers, and the export."""
    for stage in stages:
        a, b = load_stage(ours / stage)[1], load_stage(theirs / stage)[1]
        differ = [
            jax.tree_util.keystr(path)
            for path, equal in jax.tree_util.tree_leaves_with_path(jax.tree.map(np.array_equal, a, b))
            if not equal
        ]
        assert not differ, f"{stage}: {differ}"
        for kind in ("train", "eval"):
            assert records(ours, stage, kind) == records(theirs, stage, kind), (stage, kind)
        assert answers(ours, stage) == answers(theirs, stage), stage
    a, b = export(ours), export(theirs)
    assert a.keys() == b.keys() and not (differ := [name for name in a if a[name] != b[name]]), differ
