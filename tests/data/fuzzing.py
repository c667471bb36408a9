"""Reads thousands of damaged copies of a data set, in a process of its own that is watched.

    python fuzzing.py FORMAT FOLDER COUNT SEED

FOLDER is a small sound data set of FORMAT. Each round damages one file of a copy (or swaps it, or cuts it off), opens
the copy with open_source and reads every image, label and name. Each must end in a clean result or a LrfaceError.
Anything else ends the process: another exception (exit 1, with its traceback and the round), more memory than allowed
(the limit of the address space makes it a MemoryError, the peak is checked in the end), a round of more than 20 seconds
(faulthandler ends the process), a crash. Prints {"clean": n, "refused": n, "peak_mib": n, "messages": n} in the end.
"""

import faulthandler
import json
import os
import random
import re
import resource
import shutil
import struct
import sys
import traceback
import zlib
from collections import Counter
from pathlib import Path

import cv2

from lrface.data.source import check_source, open_source
from lrface.errors import LrfaceError

ADDRESS_SPACE = 6 << 30
MAX_GROWTH = 700 << 20
ROUND_SECONDS = 20
NUMBERS = [0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x1FFFFFFF, 0x20000000, 0x7FFFFFFF, 0x80000000,
           0xFFFFFFFE, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF]  # fmt: skip
TOKENS = [b"0", b"-1", b"1e400", b"NaN", b"null", b"[]", b"{}", b'""', b"true", b"99999999999999999999", b"[[[[", b"\0",
          b"4294967296", b'"\\ud800"', b"/", b"..", b"\n", b"\t"]  # fmt: skip
MAGICS = [b"ARROW1\0\0", b"PAR1", struct.pack("<I", 0xCED7230A), b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"blpk\1",
          b"ustar\0" + b"00", b"RIFF", b"BM", b"II*\0", b"\x1f\x8b\x08", b"\x93NUMPY\1\0", b"GIF89a"]  # fmt: skip


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100_000), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bombs() -> list[bytes]:
    """Images that are small files and large pictures."""
    import numpy as np

    jpeg = bytearray(cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1].tobytes())
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    bmp = bytearray(cv2.imencode(".bmp", np.zeros((4, 4, 3), np.uint8))[1].tobytes())
    bmp[18:26] = struct.pack("<ii", 60000, 60000)
    webp = bytearray(cv2.imencode(".webp", np.zeros((16, 16, 3), np.uint8))[1].tobytes())
    webp[26:30] = b"\xff\x3f\xff\x3f"
    tall = cv2.imencode(".png", np.zeros((100_000, 1, 3), np.uint8))[1].tobytes()
    return [
        png_bomb(100_000, 100_000),
        png_bomb(0xFFFFFFFF, 0xFFFFFFFF),
        png_bomb(100_000, 1),
        png_bomb(9000, 9000),
        png_bomb(0, 7),
        tall,
        bytes(jpeg),
        bytes(bmp),
        bytes(webp),
    ]


def mutate(data: bytes, random_: random.Random, images: list[bytes]) -> bytes:
    """One to four kinds of damage."""
    changed = bytearray(data)
    for _ in range(random_.choice([1, 1, 1, 2, 4])):
        size = len(changed)
        at = random_.randrange(size) if size else 0
        # Headers and ends are what readers trust: they are hit more often than their share.
        if size > 256 and random_.random() < 0.4:
            at = random_.choice([random_.randrange(128), size - 1 - random_.randrange(128)])
        kind = random_.randrange(12)
        if kind == 0:
            del changed[at:]
        elif kind == 1 and size:
            changed[at] ^= 1 << random_.randrange(8)
        elif kind == 2 and size:
            for _ in range(random_.randrange(1, 30)):
                changed[random_.randrange(size)] = random_.randrange(256)
        elif kind in (3, 4):
            width = random_.choice([1, 2, 4, 8])
            number = random_.choice(NUMBERS) & (1 << 8 * width) - 1
            order = random_.choice(["little", "little", "big"])
            at -= at % width if random_.random() < 0.7 else 0
            changed[at : at + width] = number.to_bytes(width, order)
        elif kind == 5:
            changed[at : at + random_.randrange(64)] = b""
        elif kind == 6:
            changed[at:at] = random_.randbytes(random_.randrange(1, 64))
        elif kind == 7:
            other = random_.randrange(size) if size else 0
            changed[at : at + 64] = changed[other : other + 64]
        elif kind == 8:
            magic = random_.choice(MAGICS)
            at = 0 if random_.random() < 0.5 else at
            changed[at : at + len(magic)] = magic
        elif kind == 9:
            numbers = list(re.finditer(rb"-?\d+", bytes(changed[:100_000])))
            if numbers and random_.random() < 0.8:
                found = random_.choice(numbers)
                changed[found.start() : found.end()] = random_.choice(TOKENS)
            else:
                changed[at : at + 1] = random_.choice(TOKENS)
        elif kind == 10:
            # An image within the file is replaced, lengths kept where it fits.
            starts = [m.start() for m in re.finditer(rb"\xff\xd8\xff|\x89PNG|RIFF|BM|II\*", bytes(changed))]
            bomb = random_.choice(images)
            if starts:
                at = random_.choice(starts)
            changed[at : at + len(bomb)] = bomb
        else:
            changed = bytearray(
                random_.choice([b"", b"\0" * 100, random_.randbytes(200), bytes(changed) * 2])
            )
    return bytes(changed)


def read(path: Path) -> None:
    """Everything a user of the data reads."""
    source = open_source(path)
    source.labels.sum()
    assert len(source.identities) < 20_000_000
    failed: LrfaceError | None = None
    for step in (lambda: check_source(source, "fuzzed"), source.sources):
        try:
            step()
        except LrfaceError as error:
            failed = error
    # A file that says it has a million rows where it had ten is read in part.
    for index in range(min(len(source), 64)):
        try:
            image = source.image(index)
            assert image.ndim == 3 and image.shape[2] == 3
            source.encoded(index)
        except LrfaceError as error:
            failed = error
    if failed is not None:
        raise failed


def main(form: str, folder: Path, count: int, seed: int) -> int:
    cv2.setNumThreads(0)
    pristine = {
        path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
    read(folder / "data")
    images = bombs()
    results: Counter[str] = Counter()
    messages = set()
    copy = folder.with_name(folder.name + "-copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    names = list(pristine)
    if form == "recordio":
        # One of two rounds hits the index, so that what is wrong with the records is not always found by it.
        names = [name for name in names if name.suffix == ".rec"] * 2 + names
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    random_ = random.Random(seed)
    for number in range(count):
        name = random_.choice(names)
        # A new file, for readers may hold the old one mapped: changing that under them is another matter.
        (copy / name).unlink(missing_ok=True)
        if random_.random() < 0.98:
            damaged = mutate(pristine[name], random_, images)
            (copy / name).write_bytes(damaged)
        faulthandler.dump_traceback_later(ROUND_SECONDS, exit=True)
        try:
            read(copy / "data")
            results["clean"] += 1
        except LrfaceError as error:
            results["refused"] += 1
            messages.add(re.sub(r"\d+", "0", str(error))[:200])
        except BaseException:
            traceback.print_exc()
            print(f"round {number} of seed {seed}: {name}, kept in {copy}", file=sys.stderr)
            return 1
        faulthandler.cancel_dump_traceback_later()
        (copy / name).unlink(missing_ok=True)
        (copy / name).write_bytes(pristine[name])
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if growth > MAX_GROWTH:
        print(f"the peak of memory grew by {growth >> 20} MiB, more than {MAX_GROWTH >> 20}", file=sys.stderr)
        return 1
    shutil.rmtree(copy)
    print(json.dumps({**results, "growth_mib": growth >> 20, "messages": len(messages)}))
    if os.environ.get("SHOW_MESSAGES"):
        print("\n".join(sorted(messages)), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
