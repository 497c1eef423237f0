"""Two processes, one or both of them killed at random moments of every phase: the run goes on and ends in the same
bits, and no survivor waits."""

import random
import time
from collections import Counter

import pytest
from harness import GONE, SEED, VICTIMS, Job, assert_same_bits

pytestmark = pytest.mark.chaos
JOIN = 30
LIMITS = ("limits.heartbeat=10", f"limits.join={JOIN}")
PHASES = ("joining", "packing", "compile", "step", "save", "evaluation", "calibration", "surgery", "export")


def phase(moment: str) -> str:
    """Of stage/step/what; `compile` is whatever comes before the first finished piece of work."""
    stage, step, what = moment.split("/")
    if stage == "hf":
        return "export"
    if what.startswith(("beginning", "step 1")) or (stage != "pruned" and not step and what == "evaluating batch 1"):
        return "compile"
    if stage == "pruned":
        return "surgery" if what == "calibration batch 2" or what.startswith("evaluating") else "calibration"
    for word, name in (("pack", "packing"), ("step", "step"), ("saving", "save"), ("evaluating", "evaluation")):
        if what.startswith(word):
            return name
    return "joining"


def draw(rng: random.Random, moments: list[tuple[float, str]], kills: int) -> list[list[int]]:
    """For each run, the moments (their indices) at which it is killed: every phase about as often, in order."""
    by_phase = {name: [i for i, (_, moment) in enumerate(moments[:-1]) if phase(moment) == name] for name in PHASES}
    runs: list[list[int]] = [[] for _ in range(-(-kills // len(PHASES)))]
    for n in range(kills):
        runs[n // len(PHASES)].append(rng.choice(by_phase[PHASES[n % len(PHASES)]]))
    return [sorted(run) for run in runs]


def test_killed_at_any_moment_it_ends_in_the_same_bits(reference, kills, tmp_path):
    unbroken, moments = reference
    rng = random.Random(SEED)
    place = {moment: i for i, (_, moment) in reversed(list(enumerate(moments)))}
    hit: Counter[str] = Counter()
    print(f"\nseed {SEED}")
    for number, targets in enumerate(draw(rng, moments, kills)):
        run_dir = tmp_path / f"run{number}"
        for target in targets:
            offset = rng.uniform(0, min(moments[target + 1][0] - moments[target][0], 2))
            victims = rng.choice(VICTIMS)
            hit[kill(run_dir, place, target, offset, victims)] += 1
        with Job(run_dir, 2, 1, *LIMITS) as job:
            job.finish()
        assert_same_bits(run_dir, unbroken)
    print(f"{hit.total()} kills: {dict(hit)}")
    assert hit.total() == kills, hit
    if kills >= 2 * len(PHASES):  # one alone may come a moment late
        assert hit.keys() >= {*PHASES}, hit


def kill(run_dir, place, target, offset, victims) -> str:
    """Start, wait for a moment or one past it, kill; the survivor is gone in time. Returns the phase."""
    with Job(run_dir, 2, 1, *LIMITS) as job:
        reached = job.until(lambda: place.get(job.doing(), -1) >= target)
        if reached:
            time.sleep(offset)
        moment = job.doing()
        begun = time.monotonic()
        early = job.codes()
        assert set(early) == {None}, f"ended before it was killed: {early}\n{job.tails()}"
        waits = [job.doing(i).endswith(("joining", "starting")) for i in {0, 1} - {*victims}]
        codes = job.kill(victims, JOIN + GONE if any(waits) else GONE)
        took = time.monotonic() - begun
        print(f"{run_dir.name}: {phase(moment)} ({moment} + {offset:.1f} s), killed {victims}: {codes}, {took:.1f} s")
        return phase(moment)
