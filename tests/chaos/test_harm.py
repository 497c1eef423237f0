"""Two processes that are stopped, hang, fail alone, find a damaged state or no room: each ends as it should, and the
next run ends in the same bits."""

import os
import random
import re
import signal
import subprocess
from pathlib import Path

import pytest
from harm_cases import flip, truncate
from harness import GONE, RETRY, SEED, VICTIMS, Job, assert_same_bits

pytestmark = pytest.mark.chaos
STOPPED = (RETRY, -signal.SIGTERM)


def stopped_at(job: Job) -> list[str]:
    return [re.findall(r"stopped as asked, before (.*);", job.log(i))[-1] for i in range(len(job.processes))]


def stop(run_dir: Path, moment: str, *victims: int) -> list[str]:
    """SIGTERM at a moment: all processes end with 75, having agreed on where.

    They hear of it within a second or two, in which a job this small would do a lot: it does it slowly.
    """
    with Job(run_dir, 2, 1, "limits.join=40", pace=0.5) as job:
        assert job.until(lambda: job.has(f"(?:{moment})$")), job.tails()
        job.send(signal.SIGTERM, *victims)
        codes = job.wait(180)
        assert codes == [RETRY, RETRY], f"{moment}: {codes}\n{job.tails()}"
        where = stopped_at(job)
        print(f"SIGTERM to {victims} at {moment}: {codes}, before {where}")
        assert where[0] == where[1], job.tails()
        return where


def states(run_dir: Path, stage: str) -> list[int]:
    """Steps whose saved state counts."""
    return sorted(int(path.stem) for path in (run_dir / stage / "state" / "checksums").glob("*.json"))


def finish(run_dir: Path, unbroken: Path) -> str:
    with Job(run_dir) as job:
        job.finish()
        log = job.log()
    assert_same_bits(run_dir, unbroken)
    return log


def test_sigterm_in_every_phase(reference, kills, tmp_path):
    """Sent to one process or to both, as schedulers do; JAX tells the others."""
    unbroken, _ = reference
    rng = random.Random(SEED)
    print(f"\nseed {SEED}")
    run_dir = tmp_path / "run"
    with Job(run_dir, 2, 1, "limits.join=20") as job:
        assert job.until(lambda: "joining" in job.doing(0) and "joining" in job.doing(1))
        job.send(signal.SIGTERM, 0, 1)
        codes = job.wait(180)
        print(f"SIGTERM to both while joining: {codes}")
        assert set(codes) <= {*STOPPED}, f"{codes}\n{job.tails()}"
    moments = (
        "//packing data: pack.*",
        "parent//evaluating batch 1",  # compiling
        "parent/3/step 3",
        "parent/4/saving step 4|parent/5/.*",
        "pruned//calibration batch 1",
        "short/1/evaluating batch 1",
        "short/2/saving step 2|short/3/.*",
    )
    for moment in moments if kills >= 20 else moments[::2]:
        before = states(run_dir, "parent"), states(run_dir, "short")
        stop(run_dir, moment, *rng.choice(VICTIMS))
        after = states(run_dir, "parent"), states(run_dir, "short")
        if moment.startswith(("parent/", "short/")) and not moment.startswith("parent//"):
            assert after != before, f"{moment}: nothing was saved"
    finish(run_dir, unbroken)


def test_a_peer_that_hangs_or_fails_alone_does_not_hold_the_other(reference, tmp_path):
    unbroken, _ = reference
    run_dir = tmp_path / "run"
    with Job(run_dir, 2, 1, "limits.step=6", "limits.slow=60", pace=0.3) as job:
        assert job.until(lambda: job.has("parent/3/step 3$", 1)), job.tails()
        job.send(signal.SIGSTOP, 1)
        codes = job.wait(100, 0)
        assert codes[0] == RETRY, f"{codes}\n{job.tails()}"
        said = job.log(0)
        assert "process 0: no progress while" in said and "most recent call first" in said, job.tails()
        job.send(signal.SIGKILL, 1)
        print("hung peer:", re.findall(r"process 0: no progress.*", said))
    for culprit, faults in enumerate((("step 3", ""), ("", "calibration batch 2"))):
        with Job(run_dir, 2, 1, "limits.heartbeat=10", faults=faults) as job:
            assert not job.until(lambda: False)
            codes = job.wait(GONE)
            print(f"fault of process {culprit}: {codes}")
            assert codes[culprit] == 1, f"{codes}\n{job.tails()}"
            assert "a fault of this host alone" in job.log(culprit), job.tails()
            other = codes[1 - culprit]
            assert other == RETRY or other < 0, f"{codes}\n{job.tails()}"
    finish(run_dir, unbroken)


def test_a_damaged_state_is_named_and_the_one_before_is_used(reference, tmp_path):
    unbroken, _ = reference
    rng = random.Random(SEED)
    print(f"\nseed {SEED}")
    run_dir = tmp_path / "run"
    for stage, harm in (("parent", truncate), ("short", flip)):
        stop(run_dir, f"{stage}/4/step 4", 0)
        *_, before, newest = states(run_dir, stage)
        files = [p for p in sorted((run_dir / stage / "state" / str(newest)).rglob("*")) if p.is_file()]
        victim = rng.choice([p for p in files if p.stat().st_size])
        harm(victim)
        if stage == "parent":
            with Job(run_dir, pace=0.3) as job:
                assert job.until(lambda job=job: job.has("pruned/")), job.tails()
                job.send(signal.SIGTERM, 0)
                assert job.wait(180) == [RETRY, RETRY], job.tails()
                log = job.log()
        else:
            log = finish(run_dir, unbroken)
        print(*re.findall(r".*is damaged.*", log), sep="\n")
        assert f"state/{newest} is damaged" in log and victim.name in log, log
        assert f"going on from step {before}" in log, log


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, resized at will."""
    place = tmp_path / "run" / "parent" / "state"
    place.mkdir(parents=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"this user cannot mount a small file system: {mount.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def test_a_full_disk_is_said_and_costs_nothing_saved(reference, disk):
    unbroken, _ = reference
    run_dir = disk.parent.parent
    stop(run_dir, "parent/2/saving step 2|parent/3/.*", 0)
    newest = states(run_dir, "parent")[-1]
    usage = os.statvfs(disk)
    resize(disk, (usage.f_blocks - usage.f_bfree) * usage.f_frsize + 16384)
    with Job(run_dir) as job:
        codes = job.wait()
        said = re.findall(r"ministral-jax: .*", job.log())
        print(f"full disk: {codes}", *said, sep="\n")
        assert 0 not in codes, job.tails()
        assert any("could not be saved" in line and "No space left" in line for line in said), job.tails()
    assert states(run_dir, "parent") == [newest]
    resize(disk, 64 << 20)
    log = finish(run_dir, unbroken)
    assert "damaged" not in log and "from the beginning" not in log
