"""The one exception a user is meant to read."""


class UserError(ValueError):
    """Bad input, in one sentence: the offending value, where it came from, what is accepted. The CLI exits with 2."""
