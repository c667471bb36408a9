"""Damaged files of benchmarks: whatever is in them, the end is a result or an error with a name.

300 mutations a format by default; 10,000 with the slow tests.
"""

import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from random import Random

import cv2
import numpy as np
import pytest
import scipy.io

from lrface.benchmarks.packs import load_pack, read_pack
from lrface.benchmarks.protocols import read_cfp, read_protocol
from lrface.benchmarks.tinyface import read_tinyface
from lrface.errors import LrfaceError

INTERESTING = (
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x00" * 8,
    b"\x7f\xff\xff\xff",
    b"\x80",
    b"\n",
    b"\t",
    b",",
    b"/../",
    b"\xc2\xb2",
)
DIGITS = (b"0", b"-1", b"99999999999999999999", b"9" * 5000, b"1e9", b"1.5", b"")


def mutated(random: Random, data: bytes) -> bytes:
    """One to six changes: bits, bytes, numbers, pieces left out, doubled, moved or overwritten, an early end."""
    damaged = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3, 6))):
        if not damaged:
            break
        place = random.randrange(len(damaged))
        length = min(random.choice((1, 2, 4, 8, 40)), len(damaged) - place)
        kind = random.randrange(9)
        if kind == 0:
            damaged[place] ^= 1 << random.randrange(8)
        elif kind == 1:
            damaged[place] = random.randrange(256)
        elif kind == 2:
            del damaged[place:]
        elif kind == 3:
            del damaged[place : place + length]
        elif kind == 4:
            damaged[place:place] = damaged[place : place + length] * random.choice((1, 3, 50))
        elif kind == 5:
            piece = random.choice(INTERESTING)
            damaged[place : place + len(piece)] = piece
        elif kind == 6:
            damaged[place:place] = random.randbytes(length)
        elif kind == 7:
            other = random.randrange(len(damaged))
            damaged[place : place + length] = damaged[other : other + length]
        else:
            digits = [
                index
                for index in range(place, min(len(damaged), place + 200))
                if chr(damaged[index]).isdigit()
            ]
            if digits:
                damaged[digits[0] : digits[0] + 1] = random.choice(DIGITS)
    return bytes(damaged)


def write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def encoded(seed: int, suffix: str) -> bytes:
    image = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return cv2.imencode(suffix, image)[1].tobytes()


def packs() -> list[bytes]:
    images = [encoded(seed, suffix) for seed, suffix in enumerate((".jpg", ".png", ".bmp", ".webp"))]
    arrays = [np.frombuffer(image, np.uint8) for image in images]
    contents = [pickle.dumps((arrays, [True, np.bool_(False)]), protocol=protocol) for protocol in range(6)]
    contents += [pickle.dumps((images, np.array([True, False])), protocol=protocol) for protocol in (0, 2, 4)]
    return contents


def check_pack(folder: Path) -> None:
    path = folder / "x.bin"
    images, same = read_pack(path)
    assert len(images) == 2 * len(same) and all(isinstance(image, bytes) for image in images)
    benchmark = load_pack(path)
    assert benchmark.images.shape[1:] == (112, 112, 3) and len(benchmark) == len(same)


def check_pairs(folder: Path) -> None:
    (path,) = folder.glob("pairs.*")
    pairs = read_protocol(path)
    assert len(pairs.left) == len(pairs.right) == len(pairs.same) == len(pairs.folds) >= 2
    assert all(isinstance(text, str) for photograph in (*pairs.left, *pairs.right) for text in photograph)


def check_cfp(folder: Path) -> None:
    for split in ("FP", "FF"):
        pairs = read_cfp(folder / "Split" / split)
        assert len(pairs.left) == len(pairs.same) == len(pairs.folds) and len(set(pairs.folds)) > 1
        parts = [folder.split("/") for folder, _ in (*pairs.left, *pairs.right)]
        assert all(len(names) == 2 and not {"", ".", ".."} & set(names) for names in parts)


def check_tinyface(folder: Path) -> None:
    found = read_tinyface(folder)
    assert len(found.probe_paths) == len(found.probe_ids) and found.probe_ids.min() >= 0
    assert all((found.images / path).is_file() for path in (*found.probe_paths, *found.gallery_paths))


def cell(items: list, shape: tuple[int, ...] = (-1, 1)) -> np.ndarray:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array.reshape(shape)


def matlab(folder: Path, content: dict, compress: bool) -> bytes:
    scipy.io.savemat(folder / "made.mat", content, do_compression=compress)
    data = (folder / "made.mat").read_bytes()
    (folder / "made.mat").unlink()
    return data


def seeds(format: str, folder: Path) -> list[dict[str, bytes]]:
    """Whole sets of files of a format; the first ones to be damaged are those that come first."""
    if format == "bin":
        return [{"x.bin": data} for data in packs()]
    if format == "pairs.txt":
        lines = [f"N{n}\t1\t2\n" if n % 4 < 2 else f"N{n}\t1\tM{n}\t3\n" for n in range(40)]
        return [{"pairs.txt": f"{first}{''.join(lines)}".encode()} for first in ("10\t2\n", "20\n", "")]
    if format == "lists":
        two_lines = "".join(f"A_{n}.jpg {n % 3}\nB_{n}.jpg {n % 3}\n" for n in range(30))
        lists = [f"a/A{n}.jpg{mark}B{n}.png{mark}{n % 2}\n" for mark in " ," for n in range(30)]
        return [
            {"pairs.txt": text.encode()} for text in (two_lines, "".join(lists[:30]), "".join(lists[30:]))
        ]
    if format == "cfp":
        people = range(1, 7)
        files = {
            "Pair_list_F.txt": "".join(f"{n} ../Data/Images/{n:03d}/frontal/01.jpg\n" for n in people),
            "Pair_list_P.txt": "".join(f"{n} ../Data/Images/{n:03d}/profile/01.jpg\n" for n in people),
        }
        for split in ("FP", "FF"):
            for fold in (1, 2):
                files[f"Split/{split}/{fold:02d}/same.txt"] = "".join(f"{n},{n}\n" for n in people)
                files[f"Split/{split}/{fold:02d}/diff.txt"] = "".join(f"{n},{7 - n}\n" for n in people)
        return [{name: text.encode() for name, text in files.items()}]
    if format == "agedb":
        sides = [{"name": f"{n}_Ann_{n}_A_20", "age": n} for n in range(8)]
        split = {"pairs": cell(sides, (2, 4)), "annot": np.array([[1, -1, 1, -1]], np.int8)}
        content = {"splits": cell([split, split])}
        return [{"pairs.mat": matlab(folder, content, compress)} for compress in (True, False)]
    assert format == "tinyface"
    sets = []
    for compress in (True, False):
        files = {}
        for name, part in (
            ("gallery_match_img_ID_pairs.mat", "gallery"),
            ("probe_img_ID_pairs.mat", "probe"),
        ):
            names, ids = [f"{n}_1.jpg" for n in range(5)], np.arange(5, dtype=np.uint16)[:, None]
            files[name] = matlab(folder, {f"{part}_set": cell(names), f"{part}_ids": ids}, compress)
        sets.append(files)
    for part in ("Gallery_Match", "Probe", "Gallery_Distractor"):
        for n in range(5):
            write_file(folder / part / f"{n}_1.jpg", b"image")
    return sets


CHECKS: dict[str, Callable[[Path], None]] = {
    "bin": check_pack,
    "pairs.txt": check_pairs,
    "lists": check_pairs,
    "cfp": check_cfp,
    "agedb": check_pairs,
    "tinyface": check_tinyface,
}


@pytest.mark.parametrize("mutations", [300, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", CHECKS)
def test_damaged_files_end_in_a_result_or_a_named_error(format, mutations, tmp_path):
    originals = seeds(format, tmp_path)
    there: dict[str, bytes] = {}

    def write(files: dict[str, bytes]) -> None:
        for name, data in files.items():
            if there.get(name) != data:
                there[name] = data
                write_file(tmp_path / name, data)

    for files in originals:  # whole, they are good
        write(files)
        CHECKS[format](tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    good = bad = 0
    for number in range(mutations):
        random = Random(f"{format} {number}")
        files = random.choice(originals)
        chosen = random.choice(list(files))
        write(files | {chosen: mutated(random, files[chosen])})
        try:
            CHECKS[format](tmp_path)
            good += 1
        except LrfaceError as error:
            bad += 1
            message = str(error)
            assert str(tmp_path) in message and len(message) < 1500, message
    assert good + bad == mutations and good and bad
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes
    print(f"{format}: {mutations} mutations, {good} read, {bad} named errors")
