"""The command line as it is, noting in a file what it is doing, in a process that has imported all of it already.

Imported by the fork server of `harness.py` before it forks: so there are no threads here, and no devices.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import sys
import time
from contextlib import suppress
from multiprocessing import resource_tracker
from types import SimpleNamespace

import ministral_jax
from ministral_jax import cli
from ministral_jax.distributed import processes

LAZY = (
    "orbax.checkpoint",
    "grain",
    "tensorstore",
    "mistral_common.tokens.tokenizers.mistral",
    "pebble",
    "rich.table",
    "tensorboardX",
)


def load() -> None:
    """Everything that a run may import on its way."""
    for module in pkgutil.walk_packages(ministral_jax.__path__, "ministral_jax."):
        if not module.name.endswith("__main__"):
            with suppress(ModuleNotFoundError):  # an extra that is not here
                importlib.import_module(module.name)
    for name in LAZY:
        importlib.import_module(name)


def work(words: list[str], log: str, journal: str, fault: str, pace: float) -> None:
    """`ministral-jax WORDS` as the leader of a process group of its own.

    `fault`, a pattern, makes this process alone fail with an exception when it begins to do what matches; "" for none.
    It rests `pace` seconds before each thing it does.
    """
    os.setsid()
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1, "forked from a process with threads"
    resource_tracker._resource_tracker._fd = None  # that of the tests; it gets its own if it needs one
    keep_programs_of_every_process()

    def note(doing: str) -> None:
        with open(journal, "a", encoding="utf-8") as file:
            file.write(f"{time.time():.3f} {doing}\n")
        time.sleep(pace)
        if fault and re.match(fault, doing):
            raise ValueError("a fault of this host alone")

    processes.observe(note)
    sys.argv = [cli.__file__, *words]  # the workers of rewards are told of it
    sys.exit(cli.main(words))


def keep_programs_of_every_process() -> None:
    """On CPUs each process has keys of its own in the cache of compiled programs, where JAX writes those of the first
    alone: the others would compile everything again in each job."""
    from jax._src import compiler

    compiler.distributed = SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=None))
