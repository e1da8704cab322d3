"""Failures that a user can act on; the command line prints them as one line."""


class SenetError(Exception):
    """A failure outside the program's control (full disk, NaN loss, corrupt file): exit code 1."""


class UserError(SenetError, ValueError):
    """Bad input: the message names the argument, the value and the remedy. Exit code 2."""
