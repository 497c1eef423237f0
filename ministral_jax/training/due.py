"""When a training state is to be saved."""

from __future__ import annotations

import time

from ministral_jax.distributed.collectives import from_first
from ministral_jax.training.checkpoint import CheckpointConfig


class Due:
    """Whether a state is due: every so many steps, so many minutes after the last save, and at step `pinned`.

    The clock is process 0's, and to ask it at every step would make each of them wait for process 0. So whenever the
    processes meet, it says how many steps later they meet again: half of those that fit into the time left at the pace
    since they last met, so that one that falls is noticed; and at most twice as many as lay between, because the first
    calls return before the devices have done a step. Between two saves n steps apart that is about 2 log2 n meetings.
    """

    def __init__(self, config: CheckpointConfig, steps: int, pinned: int | None, saved: int | None):
        self._every, self._minutes, self._steps, self._pinned = config.every, config.minutes, steps, pinned
        self.restart(saved)

    def restart(self, saved: int | None) -> None:
        """The loop stands where the state of step `saved` was saved, or at its beginning."""
        self.saved, self._late, step = saved, False, saved or 0
        self._begun = time.monotonic()
        self._met, self._meeting = (step, self._begun), step + 1

    def at(self, step: int) -> bool:
        """All processes ask at every step; it stays due until `restart`."""
        every = self._every
        due = step // every > (self.saved or 0) // every or self._is_late(step)
        return (due and step < self._steps) or (step == self._pinned and step != self.saved)

    def _is_late(self, step: int) -> bool:
        if self._minutes is None or self._late or step < self._meeting:
            return self._late
        now, (before, then) = time.monotonic(), self._met
        left = self._begun + 60 * self._minutes - now
        fitting = left * (step - before) / max(now - then, 1e-3)
        ahead = from_first(0 if left <= 0 else max(1, min(int(fitting / 2), 2 * (step - before))))
        self._late = ahead == 0
        self._met, self._meeting = (step, now), step + ahead
        return self._late
