"""Explicit name -> builder tables. A name registered twice is an error; an unknown name gets the nearest one."""

import difflib
import inspect
import typing
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Generic, TypeVar

from lrface.errors import UsageError

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint " (did you mean 'x'?)" or "" when nothing known is close to ``name``."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _typed(value: Any, kind: Any, where: str) -> Any:
    """``value`` as the plain type ``kind``, or None where that may be; what is annotated otherwise passes as it is."""
    options = typing.get_args(kind)
    if len(options) == 2 and type(None) in options:
        if value is None:
            return None
        kind = next(option for option in options if option is not type(None))
    if kind not in (bool, int, float, str):
        return value
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-3 as text
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{where} must be of type {kind.__name__}; found {value!r}")
    return value


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

    def get(self, name: str) -> Callable[..., T] | None:
        """The builder of ``name``, None where there is no such name."""
        return self._builders.get(name)

    def takes(self, name: str, argument: str) -> bool:
        """Whether the builder of ``name`` has this argument; False where there is no such name."""
        return argument in self.parameters(name)

    def parameters(self, name: str) -> list[str]:
        """The arguments that the builder of ``name`` takes; none for an unknown name."""
        builder = self._builders.get(name)
        if builder is None:
            return []
        fixed = builder.keywords if isinstance(builder, partial) else {}
        return [each for each in inspect.signature(builder).parameters if each not in fixed]

    def build(self, name: str, **arguments: Any) -> T:
        """Call the builder of ``name``.

        Raises:
            UsageError: unknown name, arguments the builder does not take or of another plain type than it says.
        """
        if name not in self._builders:
            raise UsageError(
                f"unknown {self.kind} {name!r}{nearest(name, self._builders)}; known: {', '.join(self.names())}"
            )
        builder = self._builders[name]
        signature = inspect.signature(builder).parameters
        parameters = self.parameters(name)
        for argument in arguments:
            if argument not in parameters:
                raise UsageError(
                    f"unknown key {self.kind}.{argument} for {self.kind} {name!r}{nearest(argument, parameters)}; "
                    f"known: {', '.join(parameters)}"
                )
            arguments[argument] = _typed(
                arguments[argument], signature[argument].annotation, f"{self.kind}.{argument}"
            )
        return builder(**arguments)
