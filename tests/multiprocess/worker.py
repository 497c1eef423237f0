"""The command line as it is, noting in a file what it is doing: `worker.py JOURNAL FAULT PACE run ...`.

FAULT, a pattern, makes this process alone fail with an exception when it begins to do what matches; "" for none. It
rests PACE seconds before each thing it does.
"""

import re
import sys
import time

from ministral_jax import cli
from ministral_jax.distributed import processes


def note(doing: str) -> None:
    with open(journal, "a", encoding="utf-8") as file:
        file.write(f"{time.time():.3f} {doing}\n")
    time.sleep(float(pace))
    if fault and re.match(fault, doing):
        raise ValueError("a fault of this host alone")


if __name__ == "__main__":  # not in the worker processes of rewards
    journal, fault, pace = sys.argv[1:4]
    processes.observe(note)
    sys.exit(cli.main(sys.argv[4:]))
