"""The command line as it is, noting in a file what it is doing: `worker.py JOURNAL FAULT PACE run ...`.

FAULT, a pattern, makes this process alone fail with an exception when it begins to do what matches; "" for none. It
rests PACE seconds before each thing it does.
"""

import itertools
import re
import sys
import time

from ministral_jax import cli
from ministral_jax.distributed import processes

arm = processes._arm
updates = itertools.count(1)


def noted(doing: str, seconds: float) -> None:
    global updates
    if doing.startswith("step "):
        updates = itertools.count(1)
    arm(doing, seconds)
    note(doing)


def note(doing: str) -> None:
    with open(journal, "a", encoding="utf-8") as file:
        file.write(f"{time.time():.3f} {doing}\n")
    time.sleep(float(pace))
    if fault and re.match(fault, doing):
        raise ValueError("a fault of this host alone")


def note_what_is_not_polled() -> None:
    """Updates of a step, counted within it, and scoring."""
    from ministral_jax.alignment import examine
    from ministral_jax.stages import grpo, looped, odpo, online

    update_program, score_together = looped.update_program, examine.score_together

    def noting_update_program(*args):
        program = update_program(*args)

        def noting_update(*args):
            note(f"update {next(updates)}")
            return program.function(*args)

        return program._replace(function=noting_update)

    def noting_score_together(*args):
        note("scoring")
        return score_together(*args)

    grpo.update_program = odpo.update_program = noting_update_program
    examine.score_together = online.score_together = noting_score_together


if __name__ == "__main__":  # not in the worker processes of rewards
    journal, fault, pace = sys.argv[1:4]
    processes._arm = noted
    if "micro_post" in " ".join(sys.argv):
        note_what_is_not_polled()
    sys.exit(cli.main(sys.argv[4:]))
