"""Files that say which photographs make a pair, in the formats that benchmarks are given out in.

========== ================================== ===============================================================
benchmark  file                               layout
========== ================================== ===============================================================
LFW        pairs.txt                          first line ``folds <tab> pairs``; ``NAME 1 4`` is a same pair
                                              (NAME/NAME_0001.jpg, NAME/NAME_0004.jpg), ``NAME 1 OTHER 3`` a
                                              different one; a file's name may stand in place of a number.
                                              Without a first line the file names no folds
CALFW      pairs_CALFW.txt                    two lines a pair, ``FILE MARK``; mark 0: different; 1 to 10:
                                              same, of that fold. All same pairs come first
CPLFW      pairs_CPLFW.txt                    the same; the mark says only whether it is a same pair
AgeDB-30   04_FINAL_protocol_30_years.mat     ``splits``, ten cells; each has ``pairs`` (cells [2, p] of
                                              structures with ``name``, a file without suffix) and ``annot``
                                              (1: same, -1: different)
CFP        Protocol/Split/FP (or FF)          01 to 10, each with same.txt and diff.txt: ``a,b``, numbers of
                                              photographs in Protocol/Pair_list_F.txt and Pair_list_P.txt
any        a list                             ``FILE FILE 1`` or ``FILE,FILE,0``, paths below the images
========== ================================== ===============================================================

Pairs come fold by fold, the same pairs of a fold before the different ones, each in the order of the file;
AgeDB's stay in the file's order altogether. That is how InsightFace orders LFW and AgeDB-30: its packer for
AgeDB walks through this very .mat file. Its packers for CFP (src/data/cfp2pack.py of 2018) read
CFP_frontal_paris.mat and CFP_profile_paris.mat, which were never given out with CFP, and no packer for CALFW
and CPLFW was published. Whether the pairs within a fold of cfp_fp.bin, calfw.bin and cplfw.bin stand in this
order cannot be known without them; accuracies by fold, and everything over all pairs, do not depend on it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrface.benchmarks.metrics import contiguous_folds, stratified_folds
from lrface.data.matlab import read_matlab
from lrface.errors import LrfaceError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAXIMUM_BYTES = 64 * 2**20
"""Of a text file of pairs; the official ones have less than 1 MB."""

FRONTAL_LIST, PROFILE_LIST = "Pair_list_F.txt", "Pair_list_P.txt"

Photograph = tuple[str, str]
"""The folder below that of all images ("" for that one itself), and a file's name, with or without suffix. As
LFW has it, a number may stand for the file: ("NAME", "4") is NAME/NAME_0004.jpg."""


@dataclass(frozen=True)
class Pairs:
    """What a protocol says: two photographs a pair, bool [p] ``same`` and int64 [p] ``folds``."""

    left: list[Photograph]
    right: list[Photograph]
    same: NDArray[np.bool_]
    folds: NDArray[np.int64]

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.same)


def is_number(text: str) -> bool:
    """Whether a text is a whole number as protocols write them: up to nine plain digits."""
    return len(text) <= 9 and text.isascii() and text.isdigit()


def is_image_name(text: str) -> bool:
    """Whether a text ends like the name of an image file."""
    return text.lower().endswith(IMAGE_SUFFIXES)


def read_protocol(path: str | Path) -> Pairs:
    """Read a protocol in any of the formats that the text of this module lists; its content says which.

    Raises:
        LrfaceError: the file is missing, damaged or of none of these formats; the message has the line.
    """
    file = Path(path)
    if file.is_dir():
        return read_cfp(file)
    if file.suffix.lower() == ".mat":
        return read_agedb(file)
    rows = _rows(file)
    first = rows[0][1] if rows else []
    if len(first) == 2 and is_image_name(first[0]):
        return _two_lines_a_pair(file, rows)
    rows = [(number, _list_fields(fields)) for number, fields in rows]
    first = rows[0][1] if rows else []
    if len(first) == 3 and is_image_name(first[0]) and is_image_name(first[1]):
        return _pair_list(file, rows)
    return read_pairs(file)


def _list_fields(fields: list[str]) -> list[str]:
    return fields[0].split(",") if len(fields) == 1 else fields


def _rows(file: Path) -> list[tuple[int, list[str]]]:
    """The lines of a text file that are not blank, each with its number, cut at tabs where it has any."""
    try:
        size = file.stat().st_size
        if size > MAXIMUM_BYTES:
            raise LrfaceError(
                f"{file}: {size / 2**20:.0f} MiB; a pairs file has less than {MAXIMUM_BYTES // 2**20} MiB"
            )
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise LrfaceError(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise LrfaceError(
            f"{file}: not a text file in UTF-8 ({error.reason}); a pairs file is expected"
        ) from error
    return [
        (number, line.rstrip().split("\t") if "\t" in line else line.split())
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def read_pairs(path: str | Path) -> Pairs:
    """Read a pairs file in LFW's format (see the text of this module).

    Raises:
        LrfaceError: the file is missing, empty or no text, a line has neither three nor four fields, or there
            are not as many lines as the first one says. The message has the line.
    """
    file = Path(path)
    rows = _rows(file)
    if not rows:
        raise LrfaceError(f"{file}: the file is empty; pairs in LFW's format are expected")

    declared: list[int] | None = None
    number, fields = rows[0]
    if len(fields) <= 2:
        fields = [field.strip() for field in fields]
        if not all(is_number(field) and int(field) > 0 for field in fields):
            raise LrfaceError(
                f"{file}, line {number}: the first line is 'folds <tab> pairs', for example '10\\t300'; "
                f"found {_shown(fields)}"
            )
        declared = [int(field) for field in fields]
        rows = rows[1:]

    left: list[Photograph] = []
    right: list[Photograph] = []
    same: list[bool] = []
    for number, fields in rows:
        fields = [field.strip() for field in fields]
        if len(fields) not in (3, 4) or not all(fields):
            raise LrfaceError(
                f"{file}, line {number}: a pair is 'NAME 1 4' (same) or 'NAME 1 OTHER 3' (different), "
                f"three or four fields between tabs; found {len(fields)}: {_shown(fields)}"
            )
        left.append((fields[0], fields[1]))
        right.append((fields[-2] if len(fields) == 4 else fields[0], fields[-1]))
        same.append(len(fields) == 3)
    labels = np.array(same, dtype=bool)

    if declared is not None and len(declared) == 2:
        fold_count, kind = declared
        expected = 2 * fold_count * kind
        if len(labels) != expected:
            raise LrfaceError(
                f"{file}: line 1 announces {fold_count} folds of {kind} same and {kind} different pairs, "
                f"{expected} in all; {len(labels)} found. The file is cut short or not the official one"
            )
        folds = np.repeat(np.arange(fold_count, dtype=np.int64), 2 * kind)
        for fold in range(fold_count):
            positives = int(labels[folds == fold].sum())
            if positives != kind:
                raise LrfaceError(
                    f"{file}: fold {fold + 1} has {positives} same and {2 * kind - positives} different "
                    f"pairs; line 1 announces {kind} of each"
                )
        if fold_count == 1:
            folds = stratified_folds(labels)
    else:
        if declared is not None and len(labels) != 2 * declared[0]:
            raise LrfaceError(
                f"{file}: line 1 announces {declared[0]} same and as many different pairs; {len(labels)} "
                "pairs found"
            )
        folds = stratified_folds(labels)
    return _pairs(file, left, right, labels, folds)


def _shown(fields: list[str]) -> str:
    return " | ".join(fields)[:120]


def _pairs(
    file: Path,
    left: list[Photograph],
    right: list[Photograph],
    same: NDArray[np.bool_],
    folds: NDArray[np.int64],
) -> Pairs:
    if len(same) < 2:
        raise LrfaceError(f"{file}: {len(same)} pairs; at least two are needed to choose a threshold")
    return Pairs(left, right, same, folds)


def _photograph(path: str) -> Photograph:
    folder, _, name = path.replace("\\", "/").rpartition("/")
    return folder, name


def _two_lines_a_pair(file: Path, rows: list[tuple[int, list[str]]]) -> Pairs:
    """CALFW and CPLFW: two lines 'FILE MARK' a pair, mark 0 for different."""
    photographs: list[tuple[Photograph, Photograph]] = []
    marks: list[int] = []
    for (number, first), (other, second) in zip(rows[::2], rows[1::2], strict=False):
        for line, fields in ((number, first), (other, second)):
            if len(fields) != 2 or not is_image_name(fields[0]) or not is_number(fields[1]):
                raise LrfaceError(
                    f"{file}, line {line}: 'FILE.jpg MARK' is expected, as in CALFW's and CPLFW's lists; "
                    f"found {_shown(fields)}"
                )
        if int(first[1]) != int(second[1]):
            raise LrfaceError(
                f"{file}, lines {number} and {other}: two photographs of one pair carry the marks {first[1]} "
                f"and {second[1]}. A line is missing before"
            )
        photographs.append((_photograph(first[0]), _photograph(second[0])))
        marks.append(int(first[1]))
    if len(rows) % 2:
        raise LrfaceError(f"{file}, line {rows[-1][0]}: the second photograph of the last pair is missing")
    kinds = np.array(marks, dtype=np.int64)
    same = kinds > 0
    folds = np.empty(len(kinds), dtype=np.int64)
    names = np.unique(kinds[same])
    folds[same] = np.searchsorted(names, kinds[same]) if len(names) > 1 else contiguous_folds(int(same.sum()))
    folds[~same] = contiguous_folds(int((~same).sum()), len(names) if len(names) > 1 else 10)
    # fold by fold, same before different; the sort is stable
    order = np.lexsort((~same, folds))
    return _pairs(
        file,
        [photographs[index][0] for index in order],
        [photographs[index][1] for index in order],
        same[order],
        folds[order],
    )


def _pair_list(file: Path, rows: list[tuple[int, list[str]]]) -> Pairs:
    """Lines 'FILE FILE LABEL'; folds are ten consecutive blocks, or dealt out where a block has one kind."""
    left: list[Photograph] = []
    right: list[Photograph] = []
    same: list[bool] = []
    for number, fields in rows:
        fields = [field.strip() for field in fields]
        if len(fields) != 3 or not all(map(is_image_name, fields[:2])) or fields[2] not in ("1", "0", "-1"):
            raise LrfaceError(
                f"{file}, line {number}: 'FILE.jpg FILE.jpg LABEL' is expected, label 1 (same) or 0 "
                f"(different); found {_shown(fields)}"
            )
        left.append(_photograph(fields[0]))
        right.append(_photograph(fields[1]))
        same.append(fields[2] == "1")
    labels = np.array(same, dtype=bool)
    folds = contiguous_folds(len(labels))
    kinds = {(int(fold), bool(label)) for fold, label in zip(folds, labels, strict=True)}
    if len(kinds) < 2 * (int(folds.max()) + 1):
        folds = stratified_folds(labels)
    return _pairs(file, left, right, labels, folds)


# CFP


def read_cfp(split: str | Path) -> Pairs:
    """The pairs of ``Protocol/Split/FP`` (frontal against profile) or ``Protocol/Split/FF``.

    Left is always a frontal photograph. Photographs are named below ``Data/Images``.

    Raises:
        LrfaceError: a list or a fold's file is missing or broken, or a pair contradicts the file it is in.
    """
    folder = Path(split)
    kind = folder.name.upper()
    if kind not in ("FP", "FF"):
        raise LrfaceError(f"{folder}: CFP's pairs lie in Protocol/Split/FP and Protocol/Split/FF; name one")
    lists = folder.parent.parent
    frontal = _cfp_list(lists / FRONTAL_LIST)
    other = _cfp_list(lists / PROFILE_LIST) if kind == "FP" else frontal
    try:
        names = sorted(child.name for child in folder.iterdir() if is_number(child.name))
    except OSError as error:
        raise LrfaceError(f"{folder}: cannot be listed: {error.strerror or error}") from error
    if not names or [int(name) for name in names] != list(range(1, len(names) + 1)):
        raise LrfaceError(
            f"{folder}: folders 01, 02 ... (ten of them) with same.txt and diff.txt are expected, found "
            f"{', '.join(names[:12]) or 'none'}"
        )
    left: list[Photograph] = []
    right: list[Photograph] = []
    same: list[bool] = []
    folds: list[int] = []
    for fold, name in enumerate(names):
        for file, label in ((folder / name / "same.txt", True), (folder / name / "diff.txt", False)):
            for number, fields in _rows(file):
                numbers = [field.strip() for field in _list_fields(fields)]
                if len(numbers) != 2 or not all(map(is_number, numbers)):
                    raise LrfaceError(
                        f"{file}, line {number}: two numbers are expected, 'a,b'; found {_shown(fields)}"
                    )
                one, two = frontal.get(int(numbers[0])), other.get(int(numbers[1]))
                if one is None or two is None:
                    which = (
                        f"{FRONTAL_LIST} has no photograph {numbers[0]}"
                        if one is None
                        else f"{PROFILE_LIST if kind == 'FP' else FRONTAL_LIST} has no photograph {numbers[1]}"
                    )
                    raise LrfaceError(f"{file}, line {number}: {which}")
                people = one[0].split("/")[0], two[0].split("/")[0]
                if (people[0] == people[1]) != label:
                    raise LrfaceError(
                        f"{file}, line {number}: the photographs are of {people[0][:60]} and {people[1][:60]}, which "
                        f"contradicts {file.name}"
                    )
                left.append(one)
                right.append(two)
                same.append(label)
                folds.append(fold)
    labels = np.array(same, dtype=bool)
    numbers_of_folds = np.array(folds, dtype=np.int64)
    return _pairs(
        folder, left, right, labels, numbers_of_folds if len(names) > 1 else stratified_folds(labels)
    )


def _cfp_list(file: Path) -> dict[int, Photograph]:
    """``1 ../Data/Images/001/frontal/01.jpg`` -> {1: ("001/frontal", "01.jpg")}."""
    photographs: dict[int, Photograph] = {}
    for number, fields in _rows(file):
        parts = fields[1].replace("\\", "/").split("/") if len(fields) == 2 else []
        if (
            len(parts) < 3
            or not is_number(fields[0])
            or any(part in ("", ".", "..") for part in parts[-3:])
            or not is_image_name(parts[-1])
        ):
            raise LrfaceError(
                f"{file}, line {number}: '1 ../Data/Images/001/frontal/01.jpg' is expected; found "
                f"{_shown(fields)}"
            )
        if int(fields[0]) in photographs:
            raise LrfaceError(f"{file}, line {number}: photograph {fields[0]} is listed twice")
        photographs[int(fields[0])] = f"{parts[-3]}/{parts[-2]}", parts[-1]
    if not photographs:
        raise LrfaceError(f"{file}: the file is empty; a list of photographs is expected")
    return photographs


# AgeDB


_AGEDB_NAME = re.compile(r"(?P<identity>\d{1,9})_(?P<name>.+)_(?P<age>\d{1,3})_(?P<gender>[a-zA-Z])")


def agedb_name(stem: str) -> tuple[int, str, int, str] | None:
    """Number, name, age and gender of a photograph of AgeDB, ``0_MariaCallas_35_f``; None for other names."""
    match = _AGEDB_NAME.fullmatch(stem)
    if match is None:
        return None
    return int(match["identity"]), match["name"], int(match["age"]), match["gender"].lower()


def read_agedb(path: str | Path) -> Pairs:
    """AgeDB's protocol, ``04_FINAL_protocol_30_years.mat`` (or 5, 10, 20 years), in the file's order.

    Raises:
        LrfaceError: see :func:`~lrface.data.matlab.read_matlab`; another content.
    """
    file = Path(path)
    variables = read_matlab(file)
    left: list[Photograph] = []
    right: list[Photograph] = []
    same: list[bool] = []
    folds: list[int] = []
    splits = _items(variables.get("splits"))
    if not splits:
        raise LrfaceError(
            f"{file}: the variable 'splits' of AgeDB's protocols is expected, found "
            f"{', '.join(map(repr, list(variables)[:10])) or 'no variables'}"
        )
    for fold, split in enumerate(splits):
        where = f"{file}: split {fold + 1}"
        content = _structure(split)
        pairs, labels = content.get("pairs"), content.get("annot")
        if (
            not isinstance(pairs, np.ndarray)
            or pairs.ndim != 2
            or pairs.shape[0] != 2
            or pairs.dtype != object
        ):
            raise LrfaceError(f"{where}: 'pairs' with two rows of photographs is expected")
        if not isinstance(labels, np.ndarray) or labels.dtype == object or labels.size != pairs.shape[1]:
            raise LrfaceError(f"{where}: 'annot' with {pairs.shape[1]} labels is expected, one a pair")
        for pair in range(pairs.shape[1]):
            names = [_structure(pairs[row, pair]).get("name") for row in (0, 1)]
            label = labels.flat[pair]
            plain = [name for name in names if isinstance(name, str) and name.strip() and "/" not in name]
            if len(plain) != 2 or label not in (1, 0, -1):
                raise LrfaceError(
                    f"{where}, pair {pair + 1}: two names of files and the label 1 or -1 are expected, found "
                    f"{str(names)[:160]} and {label}"
                )
            left.append(("", plain[0].strip()))
            right.append(("", plain[1].strip()))
            same.append(bool(label == 1))
            folds.append(fold)
    numbers = np.array(folds, dtype=np.int64)
    kinds = np.array(same, dtype=bool)
    return _pairs(file, left, right, kinds, numbers if len(splits) > 1 else stratified_folds(kinds))


def _items(value: Any) -> list[Any]:
    return list(value.flatten(order="F")) if isinstance(value, np.ndarray) and value.dtype == object else []


def _structure(value: Any) -> dict[str, Any]:
    """The structure in a cell of one structure, however often it is wrapped; {} for anything else."""
    for _ in range(4):
        if isinstance(value, dict):
            return value
        items = _items(value)
        if len(items) != 1:
            break
        value = items[0]
    return value if isinstance(value, dict) else {}
