"""Where the time of a stage went, as records in its metrics.jsonl; no service is needed to read them.

A record `{"kind": "time", "attempt", "from", "step", "at", "seconds": {what: seconds}}` holds the seconds since the
record before it. `from` is the step at which the attempt began, `at` the time of day.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

KINDS = ("start", "compile", "data", "generate", "score", "step", "checkpoint", "evaluate", "lost", "down")
"""`start`: loading until the first step. `generate`, `score`: sampling answers, judging them. `lost`: done again after
a restart. `down`: between the attempts."""
WRITE_SECONDS = 10.0


class Clock:
    """A stopwatch that always runs for one purpose."""

    def __init__(self) -> None:
        self._what, self._since = "start", time.monotonic()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._log: Any = None
        self._written = self._since

    def switch(self, what: str) -> None:
        now = time.monotonic()
        self._seconds[self._what] += now - self._since
        self._what, self._since = what, now

    def begin_attempt(self, log: Any, step: int) -> None:
        """From now on records go to `log`."""
        self._log, self._from, self._attempt = log, step, log.attempts + 1

    def write(self, step: int) -> None:
        self.switch(self._what)
        seconds = {what: round(spent, 4) for what, spent in self._seconds.items()}
        self._log.write_time({"attempt": self._attempt, "from": self._from, "step": step, "seconds": seconds})
        self._seconds.clear()
        self._written = self._since

    def write_sometimes(self, step: int) -> None:
        if time.monotonic() - self._written >= WRITE_SECONDS:
            self.write(step)


def goodput(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by kind, over all attempts of a stage, from the records of its metrics.jsonl.

    What an attempt did beyond the step from which the next one went on is `lost`; the time from its last record to the
    next attempt's begin is `down`.
    """
    total: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    attempts: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        if record.get("kind") == "time":
            attempts.setdefault(record["attempt"], []).append(record)
    order = sorted(attempts)
    for number, following in itertools.zip_longest(order, order[1:]):
        kept_until = attempts[following][0]["from"] if following is not None else None
        for record in attempts[number]:
            lost = kept_until is not None and record["step"] > kept_until
            for what, seconds in record["seconds"].items():
                total["lost" if lost else what] += seconds
        if following is not None:
            first = attempts[following][0]
            began = first["at"] - sum(first["seconds"].values())
            total["down"] += max(began - attempts[number][-1]["at"], 0.0)
    return {what: round(seconds, 3) for what, seconds in total.items() if seconds > 0}
