"""Rewards of the tests, by dotted path."""

import time


def spread(sample) -> float:
    """Differs between almost any two answers: how spread out their tokens are."""
    return (sum(sample.tokens) % 97) / 97


def asleep(sample) -> float:
    time.sleep(60)
    return 0.0
