"""Files that appear whole or not at all: written aside, synced, renamed."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lrface.errors import LrfaceError


def explain(error: OSError, path: Path) -> LrfaceError:
    """The error for a user from what the system said about writing ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LrfaceError(
            f"cannot write {path}: the disk is full. Nothing finished before is lost; free space and run the same "
            "command again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return LrfaceError(
            f"cannot write {path}: {error.strerror}. Make its folder writable or choose another place"
        )
    return LrfaceError(f"cannot write {path}: {error.strerror or error}")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it is synced and renamed to ``path``, else removed.

    Raises:
        LrfaceError: the disk is full or the place cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _sync(aside)
        os.replace(aside, path)
        _sync(path.parent)
    except OSError as error:
        raise explain(error, path) from error
    finally:
        with suppress(OSError):
            aside.unlink()


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Give a temporary directory; on success its files are synced and it is renamed to ``path``, else removed.

    Raises:
        LrfaceError: the disk is full or the place cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A killed process of the same number may have left it: in a container every run can have that number.
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        yield aside
        for file in aside.iterdir():
            _sync(file)
        if path.exists():
            shutil.rmtree(path)
        os.replace(aside, path)
        _sync(path.parent)
    except OSError as error:
        raise explain(error, path) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold ``folder/.lock`` so that a second process on the same folder is refused instead of undoing this one's work.

    The lock ends with this process, however it ends; forked workers do not hold it.

    Raises:
        LrfaceError: another process holds it, or the folder cannot be written.
    """
    path = Path(folder) / ".lock"
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise explain(error, path) from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Any other error: a file system without locks, where one goes on without.
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(descriptor)
            raise LrfaceError(f"{folder}: another run is working on it; wait for it or stop it") from None
    try:
        yield
    finally:
        # The file stays: removing it would let a third process lock another file of the same name.
        os.close(descriptor)


def is_locked(folder: str | Path) -> bool:
    """Whether another process holds :func:`locked` on ``folder``. Never ask for a folder that this process holds
    itself: a process that closes a file gives up all its locks on it."""
    path = Path(folder) / ".lock"
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(descriptor)
    return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` whole or not at all."""
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read a JSON object. Raises LrfaceError naming ``what`` when it is missing or broken."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LrfaceError(f"{path} ({what}) does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise LrfaceError(f"{path} ({what}) cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise LrfaceError(f"{path} ({what}) must hold a JSON object; found {type(value).__name__}")
    return value
