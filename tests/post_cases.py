"""Rewards of the tests, by dotted path."""

import sys
import time


def spread(sample) -> float:
    """Differs between almost any two answers: how spread out their tokens are."""
    return (sum(sample.tokens) % 97) / 97


def of_some(sample) -> float:
    """As `spread`, of the answers to half of the prompts; the others earn the same."""
    return spread(sample) if sum(map(ord, str(sample.prompt[-1]["content"]))) % 2 else 0.0


def asleep(sample) -> float:
    time.sleep(60)
    return 0.0


def fails_on_the_second_process(sample) -> float:
    if sys.argv[sys.argv.index("--process-index") + 1] == "1":  # a worker has the arguments of its process
        raise ValueError("no reward here")
    return 0.5


def sometimes_raises(sample) -> float:
    if sum(sample.tokens) % 5 == 0:
        raise ValueError("cannot judge that")
    return spread(sample)


def sometimes_sleeps(sample) -> float:
    return asleep(sample) if sum(sample.tokens) % 5 == 0 else spread(sample)


def always_raises(sample) -> float:
    raise ValueError("never")


def always_one(sample) -> float:
    return 1.0
