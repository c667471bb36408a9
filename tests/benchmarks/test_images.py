"""Benchmarks and training data as one kind of thing: images, names, pairs."""

import pickle

import cv2
import numpy as np
import pytest

from lrface.benchmarks.images import (
    AlignedImages,
    CarrayImages,
    PackImages,
    PhotographFiles,
    describe,
    identity_of,
    joined_groups,
    open_images,
)
from lrface.data.folder import FolderSource
from lrface.errors import LrfaceError


def file(seed, size=112, suffix=".png"):
    image = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return cv2.imencode(suffix, image)[1].tobytes()


@pytest.fixture
def lfw(tmp_path):
    """Crops in LFW's layout, with a photograph that no pair names."""
    root = tmp_path / "lfw"
    for name, count in (("Ada_Ek", 3), ("Bo_Li", 2), ("Cleo", 1)):
        for number in range(1, count + 1):
            place = root / "images" / name / f"{name}_{number:04d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file(len(name) * 10 + number))
    (root / "pairs.txt").write_text(
        "2\t1\nAda_Ek\t1\t2\nAda_Ek\t1\tBo_Li\t1\nBo_Li\t1\t2\nBo_Li\t2\tCleo\t1\n"
    )
    return root


@pytest.fixture
def pack(tmp_path):
    """Images 0 and 1 are one person, 1 and 2 too, 3 is another, and 0 occurs twice."""
    images = [file(seed) for seed in (0, 1, 1, 2, 0, 3)]
    path = tmp_path / "small.bin"
    path.write_bytes(pickle.dumps((images, [True, True, False]), protocol=2))
    return path


def test_a_folder_with_pairs_is_all_its_photographs_and_counts_of_pairs(lfw):
    images = open_images(lfw)
    assert isinstance(images.source, FolderSource)
    assert len(images.source) == 6
    assert images.pairs == {"pairs": 4, "same": 2, "different": 2, "folds": 2}
    info, _ = describe(str(lfw))
    assert info.pairs == images.pairs
    assert "4: 2 same, 2 different, in 2 folds" in str(info)


def test_aligned_it_is_the_images_of_the_pairs_with_their_names(lfw):
    images = open_images(lfw, aligned=True, show_progress=False)
    source = images.source
    assert isinstance(source, AlignedImages)
    assert len(source) == 5
    assert source.identities == ["Ada_Ek", "Bo_Li", "Cleo"]
    folder = FolderSource(lfw / "images")
    by_path = {path: index for index, path in enumerate(folder.sources())}
    for index, place in enumerate(source.sources()):
        name, number = place.split()
        original = by_path[f"{name}/{name}_{int(number):04d}.png"]
        np.testing.assert_array_equal(source.image(index), folder.image(original))
        assert source.identities[source.labels[index]] == name
        assert source.encoded(index) is None


def test_a_benchmark_is_found_by_name(lfw, monkeypatch):
    monkeypatch.chdir(lfw.parent.parent)  # no folder called lfw here
    images = open_images("lfw", data=lfw.parent)
    assert len(images.source) == 6
    with pytest.raises(LrfaceError, match="no known benchmark and no path"):
        open_images("nothing_of_this_name")


def test_a_pack_is_its_distinct_images_in_groups_of_one_person(pack):
    images = open_images(pack)
    source = images.source
    assert isinstance(source, PackImages)
    assert not images.named
    assert images.pairs == {"pairs": 3, "same": 2, "different": 1, "folds": 3}
    assert len(source) == 4
    assert source.labels.tolist() == [0, 0, 0, 1]
    assert source.identities == ["group-0", "group-1"]
    assert source.sources() == ["image 0", "image 1", "image 3", "image 5"]
    assert [source.encoded(index) for index in range(4)] == [file(seed) for seed in range(4)]
    assert [side.tolist() for side in images.different] == [[0], [3]]
    info, _ = describe(pack)
    assert (info.images, info.identities, info.format) == (4, 0, "verification pack")


def test_a_carray_with_pairs_is_what_the_pack_is(pack, tmp_path):
    from lrface.benchmarks.packs import load_pack
    from lrface.data.carray import CarrayWriter

    packed = load_pack(pack)
    indices = np.stack([packed.left, packed.right], axis=1).reshape(-1)
    (tmp_path / "small").mkdir()
    writer = CarrayWriter(tmp_path / "small", (112, 112), len(indices))
    for index in indices:
        writer.add(packed.images[index])
    writer.close()
    np.save(tmp_path / "small_list.npy", packed.same)
    images, of_pack = open_images(tmp_path / "small", show_progress=False), open_images(pack)
    assert isinstance(images.source, CarrayImages)
    assert (images.named, images.pairs) == (False, of_pack.pairs)
    assert images.source.labels.tolist() == of_pack.source.labels.tolist()
    for index in range(len(of_pack.source)):
        np.testing.assert_array_equal(images.source.image(index), of_pack.source.image(index))
    info, _ = describe(tmp_path / "small")
    assert "BGR by the convention" in info.colour


def test_training_data_beside_packs_is_training_data(lfw, pack):
    (lfw / "pairs.txt").unlink()
    pack.rename(lfw / "images" / "small.bin")
    images = open_images(lfw / "images")
    assert images.pairs is None
    assert len(images.source) == 6


def test_groups_are_what_a_search_of_the_graph_finds():
    random = np.random.default_rng(0)
    left, right = random.integers(0, 60, (2, 40))
    groups = joined_groups(60, left, right)
    reached = np.eye(60, dtype=bool)
    reached[left, right] = reached[right, left] = True
    for _ in range(6):
        reached = reached @ reached
    assert ((groups[:, None] == groups[None]) == reached).all()
    assert groups.max() + 1 == len(np.unique(groups))


def test_files_whose_names_say_who_it_is(tmp_path):
    for name in ("12_MariaCallas_35_f.jpg", "13_MariaCallas_40_f.jpg", "14_OrsonWelles_20_m.jpg"):
        (tmp_path / name).write_bytes(file(len(name)))
    source = PhotographFiles(tmp_path)
    assert source.identities == ["MariaCallas", "OrsonWelles"]
    assert source.labels.tolist() == [0, 0, 1]
    assert source.image(0).shape == (112, 112, 3)
    with pytest.raises(LrfaceError, match="no images"):
        PhotographFiles(tmp_path.parent)


@pytest.mark.parametrize(
    "photograph, name",
    [
        (("Ada_Ek", "4"), "Ada_Ek"),
        (("001/frontal", "01.jpg"), "001"),
        (("", "Ada_Ek_0001.jpg"), "Ada_Ek"),
        (("", "0_MariaCallas_35_f"), "MariaCallas"),
        (("", "0_MariaCallas_35_f.jpg"), "MariaCallas"),
        (("", "portrait.jpg"), "portrait"),
    ],
)
def test_whom_a_photograph_shows(photograph, name):
    assert identity_of(photograph) == name


def test_the_real_pack(shared):
    info, source = describe(shared / "data" / "formats" / "small_lfw.bin")
    assert info.pairs == {"pairs": 10, "same": 10, "different": 0, "folds": 10}
    assert (info.images, info.sizes) == (17, [[112, 112, 17]])
    # Pairs of one person are in one group.
    assert (source.labels[source.left] == source.labels[source.right]).all()
