"""Post-training of two processes, one or both of them killed at random moments of every kind of stage, or stopped:
the run goes on and ends in the same bits, and no survivor waits."""

import os
import random
import signal
import time

import pytest
from harness import POST, POST_TRAINED, RETRY, SEED, VICTIMS, Job, answers, assert_same_bits, gone, records

pytestmark = pytest.mark.chaos
STEPS = ("stages.parent.steps=2", *(f"stages.{stage}.steps=4" for stage in ("sft", "reward", "instruct", "rl")),
         "stages.offline.steps=2", "stages.pairs.optional=false", "stages.offline.optional=false")  # fmt: skip
LIMITS = ("limits.heartbeat=10", "limits.join=60")
STOPPED = "(instruct|rl)/[34]/(judging|scoring)"
# What a kill struck may have been saved by then and so not come again: each has a later moment in its place.
MOMENTS = ("sft/2/scoring", "(sft|reward)/2/saving", "(reward|instruct)/[24]/evaluating",
           "(reward|instruct)/[234]/judging", "(instruct|rl)/[234]/sampling token", STOPPED,
           "offline//reference batch [2-9]", "rl/[1-4]/scoring", "rl/[2-4]/sampling token",
           "rl/[1-4]/update [2-4]")  # fmt: skip
FEWER = ("(sft|reward)/2/saving", "(instruct|rl)/[234]/sampling token", STOPPED, "offline//reference batch [2-9]",
         "rl/[1-4]/update [2-4]")  # fmt: skip


def test_killed_in_every_kind_of_stage_it_ends_in_the_same_bits(kills, tmp_path):
    rng, unbroken = random.Random(SEED), tmp_path / "unbroken"
    print(f"\nseed {SEED}")
    with Job(unbroken, 2, 1, *STEPS, *LIMITS, recipe=POST) as job:
        job.finish()
    # there is something to compare: answers that were drawn, and groups that are learnt from
    assert all(len({a["answer"] for a in answers(unbroken, stage)}) > 1 for stage in ("sft", "instruct", "rl"))
    assert all(r["groups_with_signal"] > 0 for r in records(unbroken, "rl", "train"))
    stages = (*POST_TRAINED, "offline")
    assert [len(records(unbroken, stage, "train")) for stage in stages] == [2, 4, 4, 4, 4, 2]
    run_dir = tmp_path / "killed"
    for moment in MOMENTS if kills >= 20 else FEWER:
        victims = [0] if moment == STOPPED else rng.choice(VICTIMS)
        with Job(run_dir, 2, 1, *STEPS, *LIMITS, recipe=POST, pace=0.05) as job:
            assert job.until(lambda job=job, moment=moment: job.has(moment)), job.tails()
            time.sleep(rng.uniform(0, 0.3))
            assert job.codes() == [None, None], job.tails()
            begun, struck = time.monotonic(), job.doing()
            if moment == STOPPED:
                os.killpg(job.processes[0].pid, signal.SIGTERM)
                codes = job.wait()
                assert codes == [RETRY, RETRY], job.tails()
            else:
                codes = job.kill(victims)
            print(f"{moment} ({struck}): {victims}: {codes}, {time.monotonic() - begun:.1f} s")
            assert all(gone(process.pid) for process in job.processes), "workers of rewards outlive the run"
    with Job(run_dir, 2, 1, *STEPS, *LIMITS, recipe=POST) as job:
        job.finish()
    assert_same_bits(run_dir, unbroken, stages)
    assert (run_dir / "pairs" / "pairs.jsonl").read_bytes() == (unbroken / "pairs" / "pairs.jsonl").read_bytes()
