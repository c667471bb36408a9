"""What the scripts of data_prep/ share: checking a downloaded data set and putting it where lrface looks for it.

A script defines ``prepare(job)`` and calls :func:`main`. Two kinds of findings are kept apart. A *problem* makes the
data useless for what it is meant for (a protocol that cannot be read, photographs that it names and that are not
there, an array of the wrong shape): nothing is put in place, and the script exits with 1. A *deviation* is a number or
a checksum other than the published one: it is listed, and fails only with ``--strict``, since a set cleaned of a few
broken files is still of use, and its owner should know.
"""

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lrface.data.folder import SUFFIXES
from lrface.errors import LrfaceError
from lrface.files import explain
from lrface.progress import progress

_CHUNK = 2**20
_QUICK_TO_READ = 64 * 2**20


class Preparation:
    """One run of a script: what it found in ``source``, and what is to be put under ``out``."""

    def __init__(self, source: str | Path, out: str | Path, copy: bool = False, strict: bool = False):
        self.source = Path(source).expanduser()
        self.out = Path(out).expanduser()
        self.copy = copy
        self.strict = strict
        self.facts: list[str] = []
        self.deviations: list[str] = []
        self.problems: list[str] = []
        self.next_command = ""
        self._places: list[tuple[Path, Path]] = []

    def find(self, *candidates: str, what: str) -> Path:
        """The first of these paths below the source that exists.

        Raises:
            LrfaceError: none does; the message names them.
        """
        for candidate in candidates:
            if (self.source / candidate).exists():
                return self.source / candidate
        raise LrfaceError(
            f"{self.source}: {what} not found; looked for {', '.join(candidates)} there. Unpack what you downloaded, "
            "and name the folder that holds it"
        )

    def count(self, what: str, found: int, expected: int | None = None) -> None:
        """Report a number; one other than the published one is a deviation."""
        if expected is None or found == expected:
            self.facts.append(f"{found:,} {what}" + (" (as published)" if expected is not None else ""))
        else:
            self.facts.append(f"{found:,} {what}")
            self.deviations.append(f"{found:,} {what}; {expected:,} were published")

    def problem(self, what: str) -> None:
        """Report something that makes the data useless."""
        self.problems.append(what)

    def missing(self, names: Sequence[str], where: Path, what: str) -> None:
        """Report files that are named and not there: a problem."""
        if names:
            self.problem(f"{len(names):,} {what} are not in {where}, the first: {', '.join(names[:5])[:300]}")

    def md5(self, file: Path, expected: str) -> None:
        """Compare a file with its published MD5; a difference is a deviation. A file that is not there is passed
        over, and a large one without ``--strict``."""
        if file.is_file() and (self.strict or file.stat().st_size <= _QUICK_TO_READ):
            digest = hashlib.md5(usedforsecurity=False)
            with (
                open(file, "rb") as stream,
                progress(file.stat().st_size // _CHUNK, f"md5 {file.name}", unit="MiB") as bar,
            ):
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
                    bar.advance()
            found = digest.hexdigest()
            self.facts.append(f"{file.name}: MD5 {found}" + (" (as published)" if found == expected else ""))
            if found != expected:
                self.deviations.append(f"{file}: MD5 {found}; {expected} was published")

    def array(self, file: Path, shape: tuple[int, ...], kind: DTypeLike | None = None) -> NDArray[Any] | None:
        """A .npy file, mapped; None, and a problem, when it cannot be read or is not of this shape and type (without
        ``kind``: any of whole numbers). Nothing is unpickled."""
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            self.problem(f"{file}: cannot be read as an array: {error}")
            return None
        of_kind = array.dtype == np.dtype(kind) if kind is not None else array.dtype.kind in "iu"
        if array.shape != shape or not of_kind:
            self.problem(f"{file}: {list(shape)} is expected, found {list(array.shape)} of {array.dtype}")
            return None
        return np.asarray(array)

    def place(self, path: Path, target: str) -> None:
        """Have a file or folder linked (or copied) to ``target`` below the out folder, when all checks are done."""
        self._places.append((path, self.out / target))

    def put_in_place(self) -> None:
        """Link or copy what was registered; a target that already is the same thing is left alone.

        Raises:
            LrfaceError: a target that is something else, or a place that cannot be written.
        """
        for path, target in self._places:
            if target.exists() and target.resolve() == path.resolve():
                continue
            if target.is_symlink() or target.exists():
                raise LrfaceError(
                    f"{target} exists already and is something else; move it away, or choose another OUT"
                )
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                if not self.copy:
                    target.symlink_to(path.resolve(), target_is_directory=path.is_dir())
                    continue
                aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
                try:
                    if path.is_dir():
                        shutil.copytree(path, aside)
                    else:
                        shutil.copyfile(path, aside)
                    os.replace(aside, target)
                finally:
                    if aside.is_dir():
                        shutil.rmtree(aside, ignore_errors=True)
                    else:
                        aside.unlink(missing_ok=True)
            except OSError as error:
                raise explain(error, target) from error

    def summary(self) -> str:
        """What was found, as text."""
        lines = [f"{self.source}"]
        lines += [f"  {fact}" for fact in self.facts]
        lines += [f"  deviation: {deviation}" for deviation in self.deviations]
        lines += [f"  problem: {problem}" for problem in self.problems]
        return "\n".join(lines)


def main(
    description: str | None, prepare: Callable[[Preparation], None], arguments: Sequence[str] | None = None
) -> int:
    """The command line of a script: ``SRC [OUT] [--copy] [--strict] [--check]``.

    Returns:
        0; 1 when the data is useless, or deviates and ``--strict`` was given. Everything that is wrong is listed.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", help="the folder that holds what you downloaded, unpacked")
    parser.add_argument(
        "out",
        metavar="OUT",
        nargs="?",
        help="the folder that lrface looks for data in (default: $LRFACE_DATA, else ~/.cache/lrface)",
    )
    parser.add_argument("--check", action="store_true", help="only check; put nothing in place")
    parser.add_argument("--copy", action="store_true", help="copy; without it, links to SRC are made")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail on any count or checksum other than the published one; large files are hashed too",
    )
    options = parser.parse_args(arguments)
    out = options.out or os.environ.get("LRFACE_DATA") or "~/.cache/lrface"
    job = Preparation(options.source, out, copy=options.copy, strict=options.strict)
    try:
        if not job.source.is_dir():
            raise LrfaceError(
                f"{job.source}: no such folder; unpack what you downloaded, and name the folder"
            )
        prepare(job)
    except LrfaceError as error:
        job.problem(str(error))
    failed = bool(job.problems or (options.strict and job.deviations))
    print(job.summary())
    if failed:
        print("error: not in order, see above; nothing was put in place", file=sys.stderr)
        return 1
    if options.check:
        return 0
    try:
        job.put_in_place()
    except LrfaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"in place under {job.out}" + (f"; next:\n  {job.next_command}" if job.next_command else ""))
    return 0


def image_files(folder: Path, pattern: str = "*") -> Iterator[Path]:
    """Image files below a folder that fit a pattern of ``Path.glob``; hidden ones are passed over."""
    for path in folder.glob(pattern):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            yield path


def count_entries(folders: Iterable[Path], description: str, total: int | None = None) -> int:
    """How many image files lie directly in these folders; quick on millions of files."""
    count = 0
    with progress(total, description, unit="folders") as bar:
        for folder in folders:
            with os.scandir(folder) as entries:
                count += sum(
                    entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")
                    for entry in entries
                )
            bar.advance()
    return count


def folders_in(folder: Path) -> list[Path]:
    """Folders directly in a folder, by name; hidden ones are passed over.

    Raises:
        LrfaceError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
            )
    except OSError as error:
        raise LrfaceError(f"{folder}: cannot be listed: {error.strerror or error}") from error
    return [folder / name for name in names]
