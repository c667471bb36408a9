"""Parquet and Arrow tables in Hugging Face's layout, as others write them."""

import json
import os
import pickle

import cv2
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lrface.data import tables
from lrface.data.source import FaceSource, check_source, open_source
from lrface.data.tables import ParquetWriter, TableSource
from lrface.errors import LrfaceError


def picture(seed, side=16):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes(), pixels


LABELS = [1, 0, 1, 2, 0, 2, 2]
FILES = [picture(number)[0] for number in range(len(LABELS))]


def table(image="struct", label="label", metadata=True, files=FILES, labels=LABELS, paths=None):
    """A table with an image column of one of the layouts."""
    columns = {}
    if image == "struct":
        paths = [f"{number}.png" for number in range(len(files))] if paths is None else paths
        columns["image"] = pa.StructArray.from_arrays(
            [pa.array(files, pa.binary()), pa.array(paths, pa.string())], ["bytes", "path"]
        )
    else:
        columns["image"] = pa.array(files, image)
    columns[label] = pa.array(labels)
    features = {
        "image": {"_type": "Image"},
        label: {"names": ["Ada", "Bela", "Çelik"], "_type": "ClassLabel"},
    }
    description = json.dumps({"info": {"features": features}})
    return pa.table(columns).replace_schema_metadata({"huggingface": description} if metadata else None)


def sound(source, names=("Ada", "Bela", "Çelik")):
    assert isinstance(source, FaceSource)
    check_source(source, "table")
    assert source.labels.tolist() == LABELS and source.labels.dtype == np.int64
    assert source.identities == list(names)
    for number in (6, 0, 3, 1, 5, 2, 4):
        assert source.encoded(number) == FILES[number]
        np.testing.assert_array_equal(source.image(number), picture(number)[1])
    np.testing.assert_array_equal(source.image(-1), picture(6)[1])
    with pytest.raises(IndexError):
        source.image(7)
    assert len(set(source.sources())) == len(source) == 7


@pytest.mark.parametrize("image", ["struct", pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("kind", ["parquet", "plain parquet", "file", "stream"])
def test_layouts(tmp_path, image, kind):
    content = table(image)
    if "parquet" in kind:
        path = tmp_path / "faces.parquet"
        options = {"use_dictionary": False, "compression": "NONE"} if kind == "plain parquet" else {}
        parquet.write_table(content, path, row_group_size=3, **options)
    else:
        path = tmp_path / "faces.arrow"
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(str(path), content.schema) as writer:
            writer.write_table(content, max_chunksize=3)
    source = open_source(path)
    assert isinstance(source, TableSource) and source.format == path.suffix[1:]
    sound(source)
    assert source.sources()[3] == ("3.png" if image == "struct" else "faces/00000003")
    copy = pickle.loads(pickle.dumps(source))
    sound(copy)
    child = os.fork()
    if child == 0:
        os._exit(0 if source.encoded(4) == FILES[4] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_shards_and_names_beside_them(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    content = table(metadata=False)
    for number, rows in enumerate((content[:3], content[3:])):
        name = f"data-{number:05d}-of-00002.arrow"
        with pa.ipc.new_stream(str(folder / name), rows.schema) as writer:
            writer.write_table(rows)
    sound(open_source(folder), names="012")
    features = {"label": {"names": ["Ada", "Bela", "Çelik"], "_type": "ClassLabel"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    sound(open_source(folder))
    # The state names the files, in its order, and may leave out what lies there from another version.
    listed = [{"filename": f"data-{number:05d}-of-00002.arrow"} for number in (1, 0)]
    (folder / "state.json").write_text(json.dumps({"_data_files": listed}))
    assert open_source(folder).labels.tolist() == LABELS[3:] + LABELS[:3]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(LrfaceError, match="holds the splits train; name one"):
        open_source(tmp_path)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    with pytest.raises(LrfaceError, match="should list the files beside it"):
        open_source(folder)


def test_folders_of_parquet(tmp_path):
    (tmp_path / "data").mkdir()
    content = table()
    for number, rows in enumerate((content[:2], content[2:])):
        parquet.write_table(rows, tmp_path / "data" / f"train-{number:05d}-of-00002.parquet")
    sound(open_source(tmp_path))
    sound(open_source(tmp_path / "data"))
    parquet.write_table(content, tmp_path / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(LrfaceError, match=r"several tables \(test\*.parquet, train\*.parquet\); name one"):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "data" / "test-00000-of-00001.parquet")) == 7


def test_which_columns(tmp_path):
    path = tmp_path / "x.parquet"

    def opened(columns, metadata=None):
        parquet.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
        return TableSource(path)

    files, labels = pa.array(FILES, pa.binary()), pa.array(LABELS)
    assert opened({"crop": files, "identity_number": labels}).labels.tolist() == LABELS
    assert (
        opened({"mask": labels.cast(pa.int32()), "image": files, "thumbnail": files, "label": labels}).labels[
            3
        ]
        == 2
    )
    named = opened({"image": files, "identity": pa.array(["b", "a", "b", "c", "a", "c", "c"])})
    assert named.identities == ["a", "b", "c"] and named.labels.tolist() == LABELS
    with pytest.raises(LrfaceError, match="needs an image column .*there is none among the columns label"):
        opened({"label": labels})
    with pytest.raises(LrfaceError, match="needs a label column .*candidates are age, sex"):
        opened({"image": files, "age": labels, "sex": labels})
    with pytest.raises(LrfaceError, match="'label' has 1 rows without a value"):
        opened({"image": files, "label": pa.array([None, *LABELS[1:]], pa.int64())})
    unlabelled = opened(
        {"image": files, "label": pa.array(LABELS)}, {"huggingface": '{"info": {"features": 3}}'}
    )
    assert unlabelled.identities == ["0", "1", "2"]


def test_rows_without_a_file_are_named(tmp_path):
    parquet.write_table(table(files=[FILES[0], None, *FILES[2:]]), tmp_path / "x.parquet")
    with pytest.raises(LrfaceError, match="x.parquet: row 1 is not a readable image: it is empty"):
        TableSource(tmp_path / "x.parquet").image(1)


def test_repeated_paths_do_not_serve_as_names(tmp_path):
    parquet.write_table(table(paths=["same.png"] * 7), tmp_path / "x.parquet")
    assert TableSource(tmp_path / "x.parquet").sources()[:2] == ["x/00000000", "x/00000001"]
    parquet.write_table(table(paths=[None] * 7), tmp_path / "x.parquet")
    assert len(set(TableSource(tmp_path / "x.parquet").sources())) == 7


def test_few_row_groups_are_kept_decoded(tmp_path, monkeypatch):
    parquet.write_table(table(), tmp_path / "x.parquet", row_group_size=1)
    monkeypatch.setattr(tables, "CACHE_BYTES", 3 * len(FILES[0]))
    source = TableSource(tmp_path / "x.parquet")
    for number in (0, 1, 2, 3, 4, 5, 6, 0, 6):
        assert source.encoded(number) == FILES[number]
        assert len(source._parts[0]._cache) <= 3


def repeated(path, rows):
    image = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([bytes(100_000)]))
    content = pa.table({"image": image.cast(pa.binary()), "label": pa.array(np.zeros(rows, np.int64))})
    parquet.write_table(content, path, compression="NONE", dictionary_pagesize_limit=1 << 20)
    return path


def test_one_image_thousands_of_times_stays_small(tmp_path):
    """A dictionary page makes a small file of 200 MB of images; they are not laid out one by one."""
    path = repeated(tmp_path / "x.parquet", 2000)
    assert path.stat().st_size < 150_000
    source = TableSource(path)
    assert source.encoded(1999) == bytes(100_000)
    assert source._parts[0]._cache[0].bytes < 300_000


def test_more_rows_than_bytes_are_refused(tmp_path):
    path = tmp_path / "x.parquet"
    content = pa.table({"image": pa.array([b"x"] * 200_000), "label": pa.array(np.zeros(200_000, np.int64))})
    parquet.write_table(content, path)
    assert path.stat().st_size < 200_000
    with pytest.raises(LrfaceError, match="says 200000 rows in .* bytes: it is damaged"):
        TableSource(path)


def test_interrupted_packing_is_no_table(tmp_path):
    from lrface.data.packed import shard_name, write_shard

    row = {"image": FILES[0], "label": 0, "identity": "a", "source": "a/1.png", "face": 0, "landmarks": [0.0] * 10,
           "box": [0.0] * 4, "score": 1.0}  # fmt: skip
    write_shard(tmp_path / shard_name(0), [row])
    with pytest.raises(LrfaceError, match="packed data without index.json: packing was interrupted"):
        open_source(tmp_path)
    assert open_source(tmp_path / shard_name(0)).encoded(0) == FILES[0]


def test_compressed_and_dictionary_arrow_files_are_refused(tmp_path):
    content = table()
    with pa.ipc.new_file(
        str(tmp_path / "x.arrow"), content.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_table(content)
    with pytest.raises(LrfaceError, match="its columns are compressed"):
        TableSource(tmp_path / "x.arrow")
    coded = pa.table({"image": pa.array(FILES), "label": pa.array(["a"] * 7).dictionary_encode()})
    with pa.ipc.new_stream(str(tmp_path / "x.arrow"), coded.schema) as writer:
        writer.write_table(coded)
    with pytest.raises(LrfaceError, match="x.arrow"):
        TableSource(tmp_path / "x.arrow")


def test_what_is_written_is_hugging_faces_layout(tmp_path):
    writer = ParquetWriter(tmp_path, ["Ada", "Bela", "Çelik"], shard_bytes=1)
    for number in range(600):
        writer.add(FILES[number % 7], LABELS[number % 7], f"{number}.png")
    writer.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"train-{number:05d}-of-00003.parquet" for number in range(3)]
    content = parquet.read_table(tmp_path / names[0])
    assert content.column("image")[3].as_py() == {"bytes": FILES[3], "path": "3.png"}
    features = json.loads(content.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"] == {"names": ["Ada", "Bela", "Çelik"], "_type": "ClassLabel"}
    assert features["image"] == {"_type": "Image"}
    source = open_source(tmp_path)
    assert len(source) == 600 and source.encoded(599) == FILES[599 % 7] and source.sources()[599] == "599.png"


def test_cifar10(shared):
    """A real file, written by others."""
    source = open_source(shared / "data" / "cifar10" / "test.parquet")
    check_source(source, "cifar10")
    assert len(source) == 10_000 and np.bincount(source.labels).tolist() == [1000] * 10
    content = parquet.read_table(shared / "data" / "cifar10" / "test.parquet")
    for row in (0, 4999, 5000, 9999):
        assert source.encoded(row) == content.column("image")[row].as_py()["bytes"]
        assert source.image(row).shape == (32, 32, 3)
    with pytest.raises(LrfaceError, match="several tables"):
        open_source(shared / "data" / "cifar10")
