"""Rewards that fail for about a fifth of the answers, by dotted path."""

import time


def _fails(sample) -> bool:
    return sum(sample.tokens) % 5 == 0


def _value(sample) -> float:
    return (sum(sample.tokens) % 97) / 97


def raises(sample) -> float:
    if _fails(sample):
        raise ValueError("cannot judge that")
    return _value(sample)


def sleeps(sample) -> float:
    if _fails(sample):
        time.sleep(60)
    return _value(sample)


def always_raises(sample) -> float:
    raise ValueError("never")
