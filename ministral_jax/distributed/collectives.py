"""What the processes of a job tell each other; all of them must call these at the same point."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ministral_jax.errors import UserError

_LONGEST = 2000


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here."""
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
    text = np.frombuffer(json.dumps(value).encode(), np.uint8) if jax.process_index() == 0 else np.zeros(0, np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(text), np.int32)))
    line = text if jax.process_index() == 0 else np.zeros(length, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(line)).tobytes())


def first_problem(problem: str | None) -> str | None:
    """What the first process that has something to say says; the same on every process."""
    if jax.process_count() == 1:
        return problem
    line = np.zeros(_LONGEST, np.uint8)
    text = np.frombuffer((problem or "").encode()[:_LONGEST], np.uint8)
    line[: len(text)] = text
    lines = np.asarray(multihost_utils.process_allgather(line))
    problems = [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in lines]
    return next((text for text in problems if text), None)


def first_then_all(work: Callable[[], None]) -> None:
    """`work` by the first process, which writes files that the others then find.

    Raises:
        UserError: the first process's, by every process.
    """
    error: UserError | None = None
    if is_first():
        try:
            work()
        except UserError as found:
            error = found
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.array(error is not None)))
        if failed and error is None:
            raise UserError("the first process found a fault, see what it says")
    if error is not None:
        raise error
    if not is_first():
        work()
