"""Errors whose message is written for the user; the command line and the scripts print them without a traceback."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class LrfaceError(Exception):
    """The job failed. The message names the file or field, what was found and what to do. Exit code 1."""

    exit_code = 1


class UsageError(LrfaceError):
    """The call itself is wrong: a value, key or path the user gave. Exit code 2."""

    exit_code = 2


@contextmanager
def errors_for_users() -> Iterator[None]:
    """Print what went wrong without a traceback; exit 1 for a failed job, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        yield
        return
    except LrfaceError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr, flush=True)
        code = 130
    # What the error's frames held goes now: freeing a network that was being trained when the interpreter ends crashes
    # PyTorch 2.11.
    gc.collect()
    raise SystemExit(code)
