"""When states are saved, by steps and by the clock of process 0."""

from itertools import pairwise

import pytest

from ministral_jax.training import due as module
from ministral_jax.training.checkpoint import CheckpointConfig
from ministral_jax.training.due import Due


@pytest.fixture
def clock(monkeypatch):
    """`[seconds, meetings]`."""
    found = [0.0, 0]

    def from_first(value):
        found[1] += 1
        return value

    monkeypatch.setattr(module.time, "monotonic", lambda: found[0])
    monkeypatch.setattr(module, "from_first", from_first)
    return found


def walk(clock, seconds, steps, **config) -> list[int]:
    """The steps at which a state is saved; step n takes `seconds(n)`, and a call returns at once."""
    due, saved = Due(CheckpointConfig(**config), steps, None, None), []
    for step in range(1, steps + 1):
        clock[0] += seconds(step - 1) if step > 1 and step - 1 not in saved else 0.0
        if due.at(step):
            saved.append(step)
            due.restart(step)
    return saved


@pytest.mark.parametrize("pace", [0.2, 1.0, 90.0, 2000.0])
def test_minutes_after_the_last_save_one_is_due_and_the_processes_seldom_meet(clock, pace):
    saved = walk(clock, lambda _: pace, 40_000, every=10**9, minutes=30)
    gaps = [b - a for a, b in pairwise(saved)]
    fitting = max(1.0, 30 * 60 / pace)
    assert gaps and all(fitting <= gap <= fitting + 3 for gap in gaps), gaps
    assert clock[1] / len(saved) <= 2.5 * int(fitting).bit_length() + 2


def test_steps_that_become_slower_or_faster_do_not_postpone_a_save(clock):
    for seconds in (lambda n: 1 + n / 100, lambda n: 10 / (1 + n / 100), lambda n: 60.0 if n % 50 == 0 else 0.5):
        saved = walk(clock, seconds, 3000, every=10**9, minutes=5)
        gaps = [sum(map(seconds, range(a, b))) for a, b in pairwise(saved)]
        assert gaps and max(gaps) < 300 + 130


def test_steps_count_too_and_what_is_due_stays_so_until_it_is_saved(clock):
    assert walk(clock, lambda _: 1.0, 100, every=40, minutes=None) == [40, 80] and clock[1] == 0
    assert walk(clock, lambda _: 1.0, 100, every=40, minutes=0.4) == pytest.approx([25, 40, 65, 80], abs=2)
    due = Due(CheckpointConfig(every=100, minutes=1), 10, None, None)
    clock[0] += 61
    assert due.at(1) and due.at(2) and not due.at(10), "the last state is the result"
    due.restart(3)
    assert not due.at(4) and due.saved == 3


def test_only_the_clock_of_process_0_counts(clock, monkeypatch):
    due = Due(CheckpointConfig(every=100, minutes=1), 50, None, None)
    clock[0] += 1e6
    monkeypatch.setattr(module, "from_first", lambda value: 5)
    assert not due.at(1)
    monkeypatch.setattr(module, "from_first", lambda value: 0)
    assert not any(map(due.at, range(2, 6))) and due.at(6)
