"""Signals that ask a run to stop: Ctrl-C, a scheduler's SIGTERM and its warning before pre-emption, SIGUSR1."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PREEMPTION = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupted(BaseException):
    """A signal asked the run to stop. In the middle of a stage a checkpoint was written first.

    No Exception, so that nothing on the way takes it for a failure that it can handle.

    Attributes: ``signal`` (number), ``step`` and ``checkpoint``, None outside of the steps of a stage: what was
        finished is on disk there.
    """

    def __init__(self, signal_number: int, step: int | None = None, checkpoint: Path | None = None):
        where = f"after step {step}, saved {checkpoint}" if checkpoint else "between training steps"
        super().__init__(f"stopped {where}; the same command goes on from there")
        self.signal = signal_number
        self.step = step
        self.checkpoint = checkpoint

    @property
    def exit_code(self) -> int:
        """A scheduler that pre-empts a run is no failure; Ctrl-C is the user giving up on it for now."""
        return 0 if self.signal in PREEMPTION else 130


class Signals:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a request to stop after the step; Ctrl-C after that stops at once.

    A scheduler warns with one signal and follows with another: that is no reason not to save.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._old: dict[int, Any] = {}

    def _handle(self, number: int, _frame: Any) -> None:
        if self.received is None:
            self.received = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def __enter__(self) -> "Signals":
        for number in (signal.SIGINT, *PREEMPTION):
            try:
                self._old[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: whoever owns it handles signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


@contextmanager
def preemptible() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 raise :class:`Interrupted`, as Ctrl-C raises KeyboardInterrupt.

    For what a run does outside of its training steps: nothing is half-written there, whenever it stops.
    """

    def stop(number: int, _frame: Any) -> None:
        raise Interrupted(number)

    old = {}
    try:
        for number in PREEMPTION:
            old[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread
        pass
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
