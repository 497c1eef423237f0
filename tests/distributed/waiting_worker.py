"""One process of two: `waiting_worker.py PORT INDEX WHAT`. Process 0 works longer than all limits, or dies of it."""

import os
import sys
import time

from ministral_jax import cli
from ministral_jax.distributed import collectives, processes

LIMITS = processes.Limits(step=1, slow=2, join=40, heartbeat=10)
WORK = 7


def work() -> None:
    processes.poll_alone("packing data")
    print("working", flush=True)
    if collectives.is_first():
        time.sleep(WORK)
        if what == "death":
            os._exit(9)
        if what == "bug":
            raise ValueError("UNAVAILABLE: a field of the data, CANCELLED: by its author")


def command(args: object) -> None:
    processes.use_cpu(1)
    processes.join(LIMITS, coordinator=f"127.0.0.1:{port}", count=2, index=int(index))
    processes.poll("beginning")
    collectives.first_then_all(work)
    if collectives.is_first():
        time.sleep(WORK if what == "barrier" else 0)
    collectives.barrier("waited")
    print("done", flush=True)


if __name__ == "__main__":
    port, index, what = sys.argv[1:]
    collectives._SLICE_MILLISECONDS = 1000
    cli._parse = lambda argv: type("Args", (), {"command": staticmethod(command)})
    sys.exit(cli.main())
