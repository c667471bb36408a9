"""Random reads of 5 KB image files, without decoding: lrface's readers against the plain Python way.

20,000 records of 4 to 6 KB of random bytes lie in files that are in the page cache; both read the same random indices in
one thread, in turns, and each gives the image file as bytes. What is compared are the fastest rounds.

rec_reads: RecordIO, ``RecordIOSource.encoded``. The peer does what mxnet's MXIndexedRecordIO.read_idx and
recordio.unpack do, in Python: seek to the offset of the key, read the frame, read the record, unpack the header, cut.

arrow_reads: packed Arrow shards, ``PackedSource.encoded``. The peer is pyarrow's ``table.column("image")[i].as_py()``
on the same memory-mapped shards as one table.
"""

import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lrface.data.packed import PackedSource, shard_name, write_index, write_shard
from lrface.data.recordio import RecordIOSource, RecordWriter

NAMES = ["rec_reads", "arrow_reads"]
RECORDS = 20_000
READS, ROUNDS = 200_000, 5
QUICK_READS, QUICK_ROUNDS = 20_000, 2
PER_SHARD = 5_000

Read = Callable[[int], bytes]


def images() -> list[bytes]:
    """The image files: random bytes, so that nothing depends on what is in them."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(4_000, 6_000, RECORDS).tolist()
    return [generator.bytes(size) for size in sizes]


def plain_recordio(path: Path) -> Read:
    """The peer of rec_reads."""
    offsets: dict[int, int] = {}
    for line in path.with_suffix(".idx").read_text().splitlines():
        key, offset = line.split("\t")
        offsets[int(key)] = int(offset)
    file = open(path, "rb")

    def read(index: int) -> bytes:
        file.seek(offsets[index + 1])
        magic, length = struct.unpack("<II", file.read(8))
        assert magic == 0xCED7230A
        data = file.read(length & (1 << 29) - 1)
        flag, label, number, _ = struct.unpack("<IfQQ", data[:24])
        return data[24:]

    return read


def prepare_rec(folder: Path, files: Sequence[bytes]) -> tuple[Read, Read]:
    writer = RecordWriter(folder, (112, 112))
    for number, data in enumerate(files):
        writer.add(data, number // 20)
    writer.finish([str(identity) for identity in range(len(files) // 20)])
    return RecordIOSource(folder).encoded, plain_recordio(folder / "train.rec")


def prepare_arrow(folder: Path, files: Sequence[bytes]) -> tuple[Read, Read]:
    rest: dict[str, Any] = {"face": 0, "landmarks": [0.0] * 10, "box": [0.0] * 4, "score": 1.0}
    shards = []
    for start in range(0, len(files), PER_SHARD):
        rows = [
            {
                "image": data,
                "label": number // 20,
                "identity": str(number // 20),
                "source": str(number),
                **rest,
            }
            for number, data in enumerate(files[start : start + PER_SHARD], start)
        ]
        shards.append(write_shard(folder / shard_name(len(shards)), rows))
    names = [str(identity) for identity in range(len(files) // 20)]
    write_index(folder, image_size=(112, 112), identities=names, shards=shards)
    tables = [
        pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in sorted(folder.glob("*.arrow"))
    ]
    table = pa.concat_tables(tables)
    return PackedSource(folder).encoded, lambda index: table.column("image")[index].as_py()


def rate(read: Read, order: Sequence[int]) -> float:
    started = time.perf_counter()
    for index in order:
        read(index)
    return len(order) / (time.perf_counter() - started)


def run(names: Sequence[str] = NAMES, quick: bool = False) -> list[dict[str, Any]]:
    reads, rounds = (QUICK_READS, QUICK_ROUNDS) if quick else (READS, ROUNDS)
    order = np.random.default_rng(1).integers(0, RECORDS, reads).tolist()
    files = images()
    rows = []
    for name, prepare in (("rec_reads", prepare_rec), ("arrow_reads", prepare_arrow)):
        if name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            ours, peer = prepare(Path(folder), files)
            for index in (0, RECORDS - 1, *order[:100]):
                assert ours(index) == peer(index) == files[index]
            rates = [(rate(ours, order), rate(peer, order)) for _ in range(rounds)]
        fastest = [max(column) for column in zip(*rates, strict=True)]
        rows.append(
            {
                "name": name,
                "ours": round(fastest[0]),
                "peer": round(fastest[1]),
                "ratio": fastest[0] / fastest[1],
                "unit": "records/s",
                "threads": 1,
                "reads": reads,
                "rounds": rounds,
            }
        )
    return rows
