"""Explicit name -> builder tables. A name registered twice is an error; an unknown name gets the nearest one."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Generic, TypeVar

from lrface.errors import UsageError

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint " (did you mean 'x'?)" or "" when nothing known is close to ``name``."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


class Registry(Generic[T]):
    """Builders of one kind of thing, by name.

    ``kind`` is the word used in error messages ("backbone", "head", ...).
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._builders: dict[str, Callable[..., T]] = {}

    def register(self, name: str, builder: Callable[..., T]) -> None:
        """Add ``builder`` under ``name``; raises ValueError when the name is taken."""
        if name in self._builders:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._builders[name] = builder

    def names(self) -> list[str]:
        return sorted(self._builders)

    def build(self, name: str, **arguments: Any) -> T:
        """Call the builder of ``name``.

        Raises:
            UsageError: unknown name, or arguments the builder does not take.
        """
        if name not in self._builders:
            raise UsageError(
                f"unknown {self.kind} {name!r}{nearest(name, self._builders)}; known: {', '.join(self.names())}"
            )
        builder = self._builders[name]
        fixed = builder.keywords if isinstance(builder, partial) else {}
        parameters = [name for name in inspect.signature(builder).parameters if name not in fixed]
        for argument in arguments:
            if argument not in parameters:
                raise UsageError(
                    f"unknown key {self.kind}.{argument} for {self.kind} {name!r}{nearest(argument, parameters)}; "
                    f"known: {', '.join(parameters)}"
                )
        return builder(**arguments)
