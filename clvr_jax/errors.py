"""What a user is told when something is wrong: one line that says what, where and what to do."""


class ClvrError(Exception):
    """A failure the user can act on. `str(error)` is one line; the CLI prints it and exits with 1."""


class UsageError(ClvrError):
    """The command or the arguments make no sense. The CLI exits with 2."""
