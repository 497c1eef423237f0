"""The job that `ministral-jax launch slurm` writes, on four nodes of a real SLURM: done, queued again, killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from cluster import managers, missing, processes, say, slurm, wait_for
from compiling import SIMPLE_LOOPS

from ministral_jax.cli import main
from ministral_jax.stages.base import load_stage

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

REPOSITORY = Path(__file__).parents[2]
RECIPE = str(REPOSITORY / "tests" / "micro.yaml")
STAGE = "14b-short"
STEPS, EVERY = 48, 6
# Nobody needs fast programs here.
COMPILING = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": f"{SIMPLE_LOOPS}--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}
LAUNCH = ("launch.slurm.nodes=4", f"launch.slurm.environment={json.dumps(COMPILING)}", "launch.slurm.restarts=3")
SETTINGS = (
    *("defaults.distill.baseline=false", f"stages.{STAGE}.steps={STEPS}", f"stages.{STAGE}.checkpoint.every={EVERY}"),
    *(f"stages.{STAGE}.evaluate.every=1000", "limits.heartbeat=10", "mesh.fsdp=4"),
)
PATIENCE = 240


@pytest.fixture(scope="module")
def cluster():
    say("a SLURM of four nodes")
    with slurm() as environment:
        say("it is up")
        yield environment
    say("it is gone")


class Job:
    """A submitted job; ended by `scancel` when a test is done with it."""

    def __init__(self, environment: dict[str, str], run_dir: Path, venv: Path, *words: str):
        self.environment, self.run_dir = environment, run_dir
        script = run_dir.with_suffix(".sbatch")
        words = (RECIPE, STAGE, *SETTINGS, *LAUNCH, f"launch.slurm.activate={venv}", *words)
        assert main(["launch", "slurm", *words, "--run-dir", str(run_dir), "--output", str(script)]) == 0
        self.id = self.tell("sbatch", "--parsable", str(script)).strip()
        self.log = run_dir.parent / f"micro-{self.id}.log"
        self.seen = ""
        say(f"job {self.id} submitted: {run_dir.name}")

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self.state() not in ("COMPLETED", "FAILED", "CANCELLED"):
            self.tell("scancel", self.id)
            self.until(lambda: self.state() == "CANCELLED" and not self.ranks(), "the job cancelled")
        assert not self.ranks()

    def tell(self, *command: str) -> str:
        told = subprocess.run(command, env=self.environment, cwd=self.run_dir.parent, capture_output=True, text=True)
        assert told.returncode == 0, f"{command}: {told.stderr}"
        return told.stdout

    def shown(self, key: str) -> str:
        found = re.search(rf"\b{key}=(\S*)", self.tell("scontrol", "show", "job", self.id))
        assert found, key
        return found[1]

    def state(self) -> str:
        state = self.shown("JobState")
        if state != self.seen:
            say(f"job {self.id} {state}, restarts {self.shown('Restarts')}, exit code {self.shown('ExitCode')}")
            self.seen = state
        return state

    def ranks(self) -> dict[int, int]:
        """Process ids of the job's living processes, by rank; and of its script, as rank -1."""
        tasks = processes(SLURM_JOB_ID=self.id)
        found = {}
        for pid in tasks:
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            rank = next((int(v.split(b"=")[1]) for v in variables if v.startswith(b"SLURM_PROCID=")), -1)
            if any(word.endswith(b"/ministral-jax") for word in words) or rank == -1:
                found[rank] = pid
        return found

    def step(self) -> int:
        """The last step that the metrics know."""
        path = self.run_dir / STAGE / "metrics.jsonl"
        lines = path.read_text().splitlines()[-1:] if path.is_file() else []
        try:
            return json.loads(lines[0])["step"] if lines else 0
        except ValueError:  # half a line
            return 0

    def until(self, ready, what: str, seconds: float = PATIENCE) -> None:
        wait_for(ready, what, seconds, lambda: f"{self.state()}, step {self.step()}\n{self.text()[-6000:]}")

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    def go_on(self) -> None:
        """Skip the delay after which SLURM starts a job again, once its first life is over: the end of that, told late,
        would be taken for the end of the second."""
        self.until(lambda: self.state() == "PENDING", "the job queued again")
        self.until(lambda: not managers(self.id), "the job's first life over")
        self.tell("scontrol", "update", f"JobId={self.id}", "StartTime=now")
        self.until(lambda: self.state() == "RUNNING", "the job started again")

    def finish(self) -> None:
        self.until(lambda: self.state() in ("COMPLETED", "FAILED", "CANCELLED"), "the job's end")
        assert (self.state(), self.shown("ExitCode")) == ("COMPLETED", "0:0"), self.text()[-6000:]
        say(f"job {self.id} done")


@pytest.fixture(scope="module")
def venv(tmp_path_factory) -> Path:
    """What `launch.slurm.activate` names: `ministral-jax` of this checkout and Python, as pip writes it, but that every
    process keeps what it has compiled."""
    path = tmp_path_factory.mktemp("venv")
    (path / "bin").mkdir()
    paths = f"{REPOSITORY}:{REPOSITORY / 'tests' / 'multiprocess'}"
    (path / "bin" / "activate").write_text(f"export PATH={path}/bin:$PATH PYTHONPATH={paths}\n")
    program = path / "bin" / "ministral-jax"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom worker import keep_programs_of_every_process\n"
        "from ministral_jax.cli import main\nkeep_programs_of_every_process()\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run directory with all that the stage needs."""
    run_dir = tmp_path_factory.mktemp("runs") / "made"
    words = ["run", RECIPE, "parent", "14b-pruned", *SETTINGS, "mesh.fsdp=1", "--cpu-devices", "1"]
    say("parent and pruned child, without SLURM")
    environment = {**os.environ, **COMPILING}
    subprocess.run(
        [sys.executable, "-m", "ministral_jax", *words, "--run-dir", run_dir],
        env=environment, cwd=REPOSITORY, check=True, capture_output=True,
    )  # fmt: skip
    return run_dir


@pytest.fixture(scope="module")
def unbroken(cluster, made, venv) -> Path:
    run_dir = shutil.copytree(made, made.with_name("unbroken"))
    with Job(cluster, run_dir, venv) as job:
        job.finish()
        assert [f"process {rank} of 4: 1 of 4 devices" in job.text() for rank in range(4)] == [True] * 4
        assert job.shown("Restarts") == "0"
    return run_dir


def copy_of(unbroken: Path, name: str) -> Path:
    """The run directory as it was before, but with what is compiled."""
    return Path(shutil.copytree(unbroken, unbroken.with_name(name), ignore=shutil.ignore_patterns(STAGE)))


def figures(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / STAGE / "metrics.jsonl").read_text().splitlines()
    kept = [record for record in map(json.loads, lines) if record["kind"] in ("train", "eval")]
    return [{key: value for key, value in record.items() if "per_second" not in key} for record in kept]


def assert_same(ours: Path, theirs: Path) -> None:
    a, b = load_stage(ours / STAGE)[1], load_stage(theirs / STAGE)[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
    assert figures(ours) == figures(theirs)


def test_requeued_and_killed(cluster, unbroken, venv):
    """Queued again by hand, then by itself when the first process is killed, then when another one is."""
    run_dir = copy_of(unbroken, "harmed")
    with Job(cluster, run_dir, venv) as job:
        job.until(lambda: job.step() > EVERY, "a first checkpoint")
        say(f"requeue at step {job.step()}")
        job.tell("scontrol", "requeue", job.id)
        job.go_on()
        stopped = re.findall(r"stopped as asked, before (.*);", job.text())
        assert len(stopped) == 4 and len(set(stopped)) == 1, job.text()[-6000:]
        say(f"all four stopped before {stopped[0]}")
        for restarts, rank in ((2, 0), (3, 2)):
            begun = job.step()
            job.until(lambda begun=begun: job.step() > begun, "a step of this life")
            say(f"kill -9 of rank {rank} at step {job.step()}")
            killed = time.monotonic()
            os.kill(job.ranks()[rank], signal.SIGKILL)
            job.until(lambda: job.state() == "PENDING", "the job queued again", 60)
            say(f"queued again after {time.monotonic() - killed:.1f} s")
            job.go_on()
            assert job.shown("Restarts") == str(restarts)
        job.finish()
        assert job.shown("Restarts") == "3"
    assert_same(run_dir, unbroken)


def test_fault_of_the_user(cluster, unbroken, venv):
    """Exit code 2 is not tried again, whichever process says so first."""
    with Job(cluster, copy_of(unbroken, "fault"), venv, "mesh.fsdp=3") as job:
        job.until(lambda: job.state() == "FAILED" or job.shown("Restarts") != "0", "the job's end")
        assert (job.state(), job.shown("Restarts"), job.shown("ExitCode")) == ("FAILED", "0", "2:0"), job.text()[-6000:]
