"""Signals that ask a run to stop: Ctrl-C, a scheduler's SIGTERM and its warning before pre-emption, SIGUSR1."""

import signal
from pathlib import Path
from typing import Any


class Interrupted(Exception):
    """A signal asked the run to stop; a checkpoint was written first.

    Attributes: ``signal`` (number), ``step`` and ``checkpoint``.
    """

    def __init__(self, signal_number: int, step: int, checkpoint: Path):
        super().__init__(f"stopped by signal {signal_number} after step {step}")
        self.signal = signal_number
        self.step = step
        self.checkpoint = checkpoint


class Signals:
    """Turns SIGINT and SIGTERM into a request to stop after the step; a second one stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._old: dict[int, Any] = {}

    def _handle(self, number: int, _frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def __enter__(self) -> "Signals":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: whoever owns it handles signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
