"""Errors for the user: one line that says what happened, where, and what to do."""


class ClvrError(Exception):
    """An error that the user can act on. `str(error)` is one line; the CLI prints it and exits with 1."""


class UsageError(ClvrError):
    """An invalid command or argument. The CLI exits with 2."""
