"""Errors whose message is written for the user; the command line prints them without a traceback."""


class LrfaceError(Exception):
    """The job failed. The message names the file or field, what was found and what to do. Exit code 1."""

    exit_code = 1


class UsageError(LrfaceError):
    """The call itself is wrong: a value, key or path the user gave. Exit code 2."""

    exit_code = 2
