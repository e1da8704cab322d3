"""Failures that a user can act on; the command line prints them as one line."""


class SenetError(Exception):
    """A failure outside the program's control (full disk, NaN loss, corrupt file): exit code 1."""


class StopSignal(KeyboardInterrupt):
    """A signal stopped a command in good order: exit code 128 + its number.

    Attributes:
        number: the signal: 2 (SIGINT, Ctrl-C) or 15 (SIGTERM).
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class UserError(SenetError, ValueError):
    """Bad input: the message names the argument, the value and the remedy. Exit code 2."""
