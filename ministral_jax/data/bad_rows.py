"""Rows that cannot be used: one pass names them all, and they are left out where the source's setting says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple, TypedDict

from ministral_jax.console import say
from ministral_jax.data.config import SourceConfig
from ministral_jax.errors import UserError

SHOWN = 5
"""Reasons that are kept of a source."""
HOPELESS = 1000
"""Bad rows from which on reading ends when they are more than half of those read so far."""


class Unusable(NamedTuple):
    """A row that is no document, and why."""

    where: str
    error: UserError


class LeftOut(TypedDict):
    """What a source was read without: how many of how many rows, and the first reasons."""

    rows: int
    of: int
    reasons: list[str]


@dataclass
class BadRows:
    """Counts the rows of a source and keeps the first reasons, so that memory is bounded however many are bad."""

    source: str
    config: SourceConfig
    rows: int = 0
    bad: int = 0
    reasons: list[str] = field(default_factory=list)
    _last: str = ""

    def good(self, where: str) -> None:
        """A row was read; one that gives two documents is said twice and counted once."""
        self.rows += where != self._last
        self._last = where

    def add(self, where: str, error: UserError) -> None:
        """A row cannot be used. Raises `UserError`: the error is not of this row alone, or most rows are bad."""
        if not str(error).startswith(where):
            raise error
        if where == self._last:
            return
        self.good(where)
        self.bad += 1
        if len(self.reasons) < SHOWN:
            self.reasons.append(str(error))
        if self.bad >= HOPELESS and 2 * self.bad > self.rows:
            self.settle()

    def settle(self) -> LeftOut:
        """What is left out, which is said. Raises `UserError`: there are bad rows that are not to be left out, or they
        are more than half."""
        found = LeftOut(rows=self.bad, of=self.rows, reasons=self.reasons)
        settle(found, self.source, self.config)
        return found


def settle(found: LeftOut, source: str, config: SourceConfig) -> None:
    """Say what is left out. Raises `UserError`: it is not to be, or it is more than half."""
    bad, rows = found["rows"], found["of"]
    if not bad:
        return
    reasons = first_of(found["reasons"], bad)
    place, noun = f"data.sources.{source}", "file" if config.kind == "text" else "row"
    if config.on_bad_row == "skip":
        if 2 * bad > rows:
            raise UserError(f"{place}: {bad} of {rows} {noun}s cannot be used, too many to be left out: {reasons}")
        say_once(f"{place}: {bad} of {rows} {noun}s are left out: {reasons}")
        return
    way_out = f"or leave such {noun}s out with {place}.on_bad_row: skip"
    if bad == 1:
        raise UserError(f"{reasons} (mend it, {way_out})")
    raise UserError(f"{place}: {bad} of {rows} {noun}s cannot be used: {reasons} (mend them, {way_out})")


def first_of(reasons: Sequence[str], count: int) -> str:
    """The first reasons, and how many of `count` there are beside them."""
    return "; ".join(reasons[:SHOWN]) + (f"; and {count - SHOWN} more" if count > SHOWN else "")


def added(first: LeftOut, later: LeftOut) -> LeftOut:
    """What a source is read without in two steps."""
    reasons = [*first["reasons"], *later["reasons"]][:SHOWN]
    return LeftOut(rows=first["rows"] + later["rows"], of=first["of"], reasons=reasons)


@cache  # every stage opens the data
def say_once(text: str) -> None:
    """A line of the log."""
    say(text)
