"""A record stage of two processes, one or both of them killed many times: the store has the unbroken one's bytes."""

import random
import time
from pathlib import Path

import pytest
from harness import SEED, VICTIMS, Job, copied, digests

from ministral_jax.teachers.store import verify

pytestmark = pytest.mark.chaos
RECIPE = Path(__file__).parent.parent / "micro_stored.yaml"
# 30 batches of training rows; where each kill strikes, counted from the start of its attempt
WORDS = ("stages.parent.steps=2", "stages.logits.rows=120", "limits.heartbeat=10", "limits.join=30")
MOMENTS = ("train batch 1", "train batch 2", "train batch 4", "train batch 3", "train batch 2", "train batch 5",
           "train batch 6", "held_out batch 1", "saving", "saving")  # fmt: skip
FEWER = ("train batch 1", "train batch 4", "held_out batch 1", "saving")


def test_killed_at_any_moment_it_is_the_same_store(kills, tmp_path):
    rng, unbroken = random.Random(SEED), tmp_path / "unbroken"
    print(f"\nseed {SEED}")
    with Job(unbroken, 2, 1, "logits", *WORDS, recipe=RECIPE) as job:
        job.finish()
    run_dir = copied(tmp_path / "killed", unbroken, "logits")
    for moment in MOMENTS if kills >= 20 else FEWER:
        victims = rng.choice(VICTIMS)
        with Job(run_dir, 2, 1, "logits", *WORDS, recipe=RECIPE, pace=0.1) as job:
            assert job.until(lambda job=job, moment=moment: job.has(f".*{moment}$")), job.tails()
            time.sleep(rng.uniform(0, 0.2))
            assert set(job.codes()) == {None}, job.tails()
            begun = time.monotonic()
            codes = job.kill(victims)
            print(f"{moment}: killed {victims}: {codes}, {time.monotonic() - begun:.1f} s")
    with Job(run_dir, 2, 1, "logits", *WORDS, recipe=RECIPE) as job:
        job.finish()
    assert not verify(str(run_dir / "logits" / "store"))
    assert digests(run_dir / "logits" / "store") == digests(unbroken / "logits" / "store")
