"""A save in progress, and what is left where one fails: one sentence, the same on every process, and no litter."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from ministral_jax.distributed.collectives import Gathering, first_problem, from_first
from ministral_jax.files import is_remote
from ministral_jax.places import remove_tree
from ministral_jax.training.checksums import Files, checksums

TEMPORARY = ".orbax-checkpoint-tmp"
FAILED = ".failed"
_POLL_SECONDS = 0.5
_OS_ERROR = "os_error_code"
"""TensorStore raises ValueError for what the operating system reports, with its number in the text."""

# Orbax logs a traceback of what fails in its threads and raises it as well; here it becomes one sentence.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))


class Writing(threading.Thread):
    """A checkpoint on its way to `path`. `begin` is called at once, in the caller's thread, because what it copies may
    be consumed by the next step; `then` in this thread of process 0, with the checksums of everything that was written.

    Processes meet while they write. One that fails leaves a mark, so that the others do not wait for it there.
    """

    def __init__(self, path: Path, begin: Callable[[], Any], then: Callable[[Files], None]):
        super().__init__(name=f"writing {path.name}", daemon=True)
        self._path, self._mark = path, _beside(path, FAILED)
        self._then, self._gathering = then, Gathering()
        self._response: Any = None
        self.error: Exception | None = None
        try:
            self._response = begin()
        except Exception as error:
            self._fail(error)
        self.start()

    def run(self) -> None:
        if self.error is not None:
            return
        try:
            self._wait()
            files = checksums(self._path, self._gathering, self._check_peers)
            if jax.process_index() == 0:
                self._then(files)
        except Exception as error:
            self._fail(error)
        finally:
            self._response = None

    def _wait(self) -> None:
        if jax.process_count() == 1:
            return self._response.result()
        while True:
            try:
                return self._response.result(timeout=_POLL_SECONDS)
            except TimeoutError as error:
                if str(error):  # Orbax's own
                    raise
            self._check_peers()

    def _check_peers(self) -> None:
        if self._mark.exists():
            raise _PeerFailed

    def _fail(self, error: Exception) -> None:
        self.error = error
        if jax.process_count() > 1:
            with suppress(OSError):  # not even room for a name: the others find out when their wait here ends
                self._mark.mkdir(parents=True, exist_ok=True)
                if is_remote(self._mark):  # where a directory is nothing until something lies in it
                    (self._mark / "here").write_bytes(b"")

    def outcome(self) -> str | None:
        """Wait for the end; why it failed, or None. The same on every process, all of which must ask.

        Raises:
            Exception: as it is, when the disk is not at fault (the program is, or the connection to other processes).
        """
        self.join()
        error = self.error
        if error is not None and not isinstance(error, (OSError, _PeerFailed)) and _OS_ERROR not in str(error):
            raise error
        if from_first(error is None):  # process 0 finishes after all others have written
            return None
        told = None if error is None or isinstance(error, _PeerFailed) else reason(error)
        return first_problem(told) or "a process gave up"


class _PeerFailed(Exception):
    """Another process could not write its part; that one knows why."""


def reason(error: BaseException) -> str:
    """One line; where the operating system is the cause, in its words."""
    text = str(error)
    number = getattr(error, "errno", None) or ((m := re.search(_OS_ERROR + r"='(\d+)'", text)) and int(m[1]))
    if number:
        return os.strerror(number)
    return text.splitlines()[0] if text else type(error).__name__


def discard(path: Path) -> None:
    """Remove a checkpoint and everything an attempt to write it left."""
    for leftover in (path, _beside(path, TEMPORARY), _beside(path, FAILED)):
        remove_tree(leftover)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
