"""Two starts in one run directory, at random moments: one of them works, the other says who does, nothing is lost."""

import random
import time

import jax
import numpy as np
import pytest
from harness import SEED, Job, records

from ministral_jax.stages.base import load_stage

pytestmark = pytest.mark.chaos
WORDS = ("pruned",)


def test_of_two_starts_one_works_and_nothing_is_lost(kills, tmp_path):
    with Job(tmp_path / "alone", 1, 1, *WORDS) as job:
        job.finish()
        whole = job.moments()[-1][0]
    rng, met = random.Random(SEED), 0
    for number in range(kills if kills >= 20 else 3):
        run_dir = tmp_path / f"run{number}"
        with Job(run_dir, 1, 1, *WORDS) as first:
            time.sleep(rng.uniform(0, whole))
            with Job(run_dir, 1, 1, *WORDS) as second:
                codes = [*first.wait(), *second.wait()]
        refused = [job for job, code in zip((first, second), codes, strict=True) if code == 2]
        assert sorted(codes) in ([0, 0], [0, 2]), f"{codes}\n{first.tails()}\n{second.tails()}"
        assert all("is being written by process" in job.log() for job in refused)
        met += len(refused)
        for stage in ("parent", "pruned"):
            ours, theirs = (load_stage(place / stage)[1] for place in (run_dir, tmp_path / "alone"))
            assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs)), stage
        for kind in ("train", "eval"):
            assert records(run_dir, "parent", kind) == records(tmp_path / "alone", "parent", kind)
    assert met, "they never met"
    print(f"{met} of {number + 1} second starts met the first")
