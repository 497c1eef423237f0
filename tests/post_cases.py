"""Rewards of the tests, by dotted path."""


def spread(sample) -> float:
    """Differs between almost any two answers: how spread out their tokens are."""
    return (sum(sample.tokens) % 97) / 97
