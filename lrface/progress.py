"""One progress bar for every long job: rate, remaining time, on standard error."""

import sys
from typing import Any

from tqdm import tqdm


class Progress:
    """A bar that knows how much is done, the rate and the remaining time; written to standard error.

    Use as a context manager. ``advance(n, **fields)`` moves the bar by ``n`` units and shows ``fields``
    behind it. On a terminal it redraws in place; in a log file it writes a line every 30 seconds.
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        unit: str = "images",
        initial: int = 0,
        enabled: bool = True,
    ):
        interactive = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=description,
            unit=f" {unit}",
            initial=initial,
            file=sys.stderr,
            disable=not enabled,
            dynamic_ncols=interactive,
            ncols=None if interactive else 110,
            mininterval=0.2 if interactive else 30.0,
            maxinterval=10.0 if interactive else 60.0,
            smoothing=0.1,
        )

    def advance(self, n: int = 1, **fields: Any) -> None:
        if fields:
            self._bar.set_postfix(fields, refresh=False)
        self._bar.update(n)

    def write(self, message: str) -> None:
        """Print a line above the bar."""
        self._bar.write(message, file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def progress(
    total: int | None, description: str, unit: str = "images", initial: int = 0, enabled: bool = True
) -> Progress:
    """A :class:`Progress` bar; ``enabled=False`` gives one that prints nothing."""
    return Progress(total, description, unit=unit, initial=initial, enabled=enabled)
