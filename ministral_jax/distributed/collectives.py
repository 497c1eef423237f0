"""What the processes of a job tell each other; all of them must call these at the same point."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from ministral_jax.distributed.processes import unwatched
from ministral_jax.errors import UserError

_LONGEST = 2000
_MEETINGS = count()
_SLICE_MILLISECONDS = 10_000
"""Between them the interpreter may answer to signals."""


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def heard(told: str, by: Iterable[int]) -> list[str]:
    """What some processes tell all when they come here; this one's is `told`. All processes must call it.

    It waits for as long as those live, whatever the limits: what they do may take any time, and where a device waits
    for another the network's own limits hold. Of one that died the coordination service knows, or is gone with it.
    """
    meeting = f"ministral_jax/{next(_MEETINGS)}"
    client: Any = distributed.global_state.client
    client.key_value_set(f"{meeting}/{jax.process_index()}", told)
    with unwatched():
        return [_read(client, f"{meeting}/{process}") for process in by]


def _read(client: Any, key: str, waiting: Callable[[], None] = lambda: None) -> str:
    while True:
        try:
            return client.blocking_key_value_get(key, _SLICE_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("DEADLINE_EXCEEDED"):
                raise
        waiting()


class Gathering:
    """What threads of the other processes tell one of process 0, while all of them go on with their steps: a collective
    would come between those of the steps, and in each process elsewhere. All processes must make one at the same point.
    """

    def __init__(self):
        self._name = f"ministral_jax/{next(_MEETINGS)}"

    def tell(self, text: str) -> None:
        """By each of the others, once."""
        client: Any = distributed.global_state.client
        client.key_value_set(f"{self._name}/{jax.process_index()}", text)

    def told(self, waiting: Callable[[], None]) -> list[str]:
        """By process 0: what each of the others tells. `waiting` is called now and then, and may raise."""
        client: Any = distributed.global_state.client
        texts = [_read(client, f"{self._name}/{other}", waiting) for other in range(1, jax.process_count())]
        if texts:
            client.key_value_delete(self._name)
        return texts


def _after_first() -> None:
    """Wait until process 0 is here, which may have worked for long while the others had nothing to do."""
    if jax.process_count() > 1:
        heard("", by=[0])


def barrier(name: str) -> None:
    """Wait until every process is here; for process 0 as long as it lives."""
    _after_first()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(array: Any) -> np.ndarray:
    """An array whole on every host, wherever its parts lie; one leaf or less at a time. All processes must call it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def agreed(value: np.ndarray | float) -> Any:
    """The first process's value, for what every host computes by itself: an eigenvector's sign may depend on it."""
    if jax.process_count() == 1:
        return value
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(value, np.float32)))


def gathered(array: np.ndarray) -> np.ndarray:
    """`[processes, ..]`: an array of equal shape from every process, to the last bit whatever its dtype."""
    own = np.ascontiguousarray(array)
    if jax.process_count() == 1:
        return own[None]
    rows = np.asarray(multihost_utils.process_allgather(own.reshape(-1).view(np.uint8)))
    return rows.view(own.dtype).reshape(-1, *own.shape)


def from_first(value: Any) -> Any:
    """The JSON value that process 0 has; the others' is not looked at."""
    if jax.process_count() == 1:
        return value
    _after_first()
    text = np.frombuffer(json.dumps(value).encode(), np.uint8) if jax.process_index() == 0 else np.zeros(0, np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(text), np.int32)))
    line = text if jax.process_index() == 0 else np.zeros(length, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(line)).tobytes())


def first_problem(problem: str | None) -> str | None:
    """What the first process that has something to say says; the same on every process."""
    if jax.process_count() == 1:
        return problem
    _after_first()
    line = np.zeros(_LONGEST, np.uint8)
    text = np.frombuffer((problem or "").encode()[:_LONGEST], np.uint8)
    line[: len(text)] = text
    lines = np.asarray(multihost_utils.process_allgather(line))
    problems = [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in lines]
    return next((text for text in problems if text), None)


def first_then_all(work: Callable[[], None]) -> None:
    """`work` by the first process, which writes files that the others then find. It may take any time.

    Raises:
        UserError: that of a process, by every process.
    """
    error: UserError | None = None
    for whose in ([0], range(1, jax.process_count())):
        if jax.process_index() in whose:
            try:
                work()
            except UserError as found:
                error = found
        if jax.process_count() > 1:
            told = heard("" if error is None else "failed", by=whose)
            if error is None and "failed" in told:
                raise UserError(f"process {whose[told.index('failed')]} found a fault, see what it says")
        if error is not None:
            raise error
