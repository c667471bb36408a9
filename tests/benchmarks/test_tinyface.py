from pathlib import Path

import numpy as np
import pytest
import scipy.io

from lrface.benchmarks.tinyface import DISTRACTOR, OFFICIAL_COUNTS, find_tinyface, read_tinyface
from lrface.errors import LrfaceError

GALLERY = {"7_1.jpg": 7, "3_2.jpg": 3, "3_1.jpg": 3}  # the order of a list is not that of names
PROBES = {"3_9.jpg": 3, "7_2.jpg": 7}
DISTRACTORS = ["b.jpg", "a.jpg", "c.png"]


@pytest.fixture(autouse=True)
def no_other_data(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LRFACE_DATA", raising=False)


def cells(names: list) -> np.ndarray:
    array = np.empty((len(names), 1), dtype=object)
    array[:, 0] = names
    return array


def write_list(testing: Path, part: str, names: list, ids: object) -> None:
    file = {"gallery": "gallery_match_img_ID_pairs.mat", "probe": "probe_img_ID_pairs.mat"}[part]
    scipy.io.savemat(testing / file, {f"{part}_set": cells(names), f"{part}_ids": ids})


def column(ids: dict[str, int]) -> np.ndarray:
    return np.array(list(ids.values()), dtype=np.uint16)[:, None]


def write(root: Path) -> Path:
    testing = root / "Testing_Set"
    for part, names in (("Gallery_Match", GALLERY), ("Probe", PROBES), ("Gallery_Distractor", DISTRACTORS)):
        for name in names:
            (testing / part).mkdir(parents=True, exist_ok=True)
            (testing / part / name).write_bytes(b"image")
    write_list(testing, "gallery", list(GALLERY), column(GALLERY))
    write_list(testing, "probe", list(PROBES), column(PROBES))
    return testing


@pytest.mark.parametrize("below", ["", "Testing_Set"])
def test_gallery_and_probes_with_their_identities(tmp_path, below):
    testing = write(tmp_path)
    (testing / "Gallery_Distractor/notes.txt").write_text("no image")
    found = read_tinyface(tmp_path / below)
    assert found.images == testing
    assert found.probe_paths == ["Probe/3_9.jpg", "Probe/7_2.jpg"] and found.probe_ids.tolist() == [3, 7]
    assert found.gallery_paths == [
        *(f"Gallery_Match/{name}" for name in GALLERY),
        *(f"Gallery_Distractor/{name}" for name in ("a.jpg", "b.jpg", "c.png")),
    ]
    assert found.gallery_ids.tolist() == [7, 3, 3, DISTRACTOR, DISTRACTOR, DISTRACTOR] and DISTRACTOR == -100
    assert found.gallery_ids.dtype == found.probe_ids.dtype == np.int64
    assert all((found.images / path).is_file() for path in (*found.gallery_paths, *found.probe_paths))


def test_counts_other_than_the_official_are_reported(tmp_path):
    testing = write(tmp_path)
    assert OFFICIAL_COUNTS == {"Probe": 3728, "Gallery_Match": 4443, "Gallery_Distractor": 153_428}
    found = read_tinyface(tmp_path)
    assert found.counts() == {"Probe": 2, "Gallery_Match": 3, "Gallery_Distractor": 3}
    assert found.deviations() == [
        "Probe: 2 images, 3,728 in the official set",
        "Gallery_Match: 3 images, 4,443 in the official set",
        "Gallery_Distractor: 3 images, 153,428 in the official set",
    ]
    (testing / "Probe/99_1.jpg").write_bytes(b"image")
    write_list(testing, "probe", ["3_9.jpg", "7_2.jpg"], np.array([[3], [8]]))
    found = read_tinyface(tmp_path)
    assert found.unlisted == 1 and found.unmatched == 1
    assert found.deviations()[3:] == [
        "1 images of Probe and Gallery_Match are in no list",
        "1 probes are of nobody in the gallery",
    ]


def test_crops_laid_out_alike(tmp_path):
    testing = write(tmp_path)
    crops = tmp_path / "crops"
    for path in testing.rglob("*"):
        if path.suffix in (".jpg", ".png"):
            crop = crops / path.relative_to(testing).with_suffix(".png")
            crop.parent.mkdir(parents=True, exist_ok=True)
            crop.write_bytes(b"crop")
    found = read_tinyface(tmp_path, images=crops)
    assert found.images == crops and found.probe_paths == ["Probe/3_9.png", "Probe/7_2.png"]
    assert all((crops / path).is_file() for path in found.gallery_paths)


def test_broken_sets_are_explained(tmp_path):
    testing = write(tmp_path)
    cases = [
        (
            ["3_9.jpg", "absent.jpg"],
            np.array([[3], [7]]),
            "1 images that it names are not in .*Probe.*absent",
        ),
        (["3_9.jpg", "../Probe/7_2.jpg"], np.array([[3], [7]]), "entry 2 of 'probe_set' is no name"),
        (["3_9.jpg", "7_2"], np.array([[3], [7]]), "entry 2 of 'probe_set' is no name"),
        (["3_9.jpg", 7], np.array([[3], [7]]), "entry 2"),
        (["3_9.jpg", "3_9.jpg"], np.array([[3], [7]]), "names 1 images twice"),
        (["3_9.jpg", "7_2.jpg"], np.array([[3]]), "2 identities is expected, found 1 entries"),
        (["3_9.jpg", "7_2.jpg"], np.array([[3], [-100]]), "no identities"),
        (["3_9.jpg", "7_2.jpg"], np.array([[3], [1.5]]), "no identities"),
        (["3_9.jpg", "7_2.jpg"], np.array([[3], [np.nan]]), "no identities"),
        (["3_9.jpg", "7_2.jpg"], "text", "found nothing"),
    ]
    for names, ids, found in cases:
        write_list(testing, "probe", names, ids)
        with pytest.raises(LrfaceError, match=found) as stop:
            read_tinyface(tmp_path)
        assert "probe_img_ID_pairs.mat" in str(stop.value)
    scipy.io.savemat(testing / "probe_img_ID_pairs.mat", {"other": 1})
    with pytest.raises(LrfaceError, match="'probe_set' with names of images is expected"):
        read_tinyface(tmp_path)
    (testing / "probe_img_ID_pairs.mat").unlink()
    with pytest.raises(LrfaceError, match="probe_img_ID_pairs.mat: cannot be read"):
        read_tinyface(tmp_path)


def test_a_missing_part_is_named(tmp_path):
    testing = write(tmp_path)
    (testing / "Gallery_Distractor").rename(tmp_path / "elsewhere")
    with pytest.raises(LrfaceError, match="Gallery_Distractor: cannot be listed"):
        read_tinyface(tmp_path)


@pytest.mark.parametrize("below", ["", "tinyface", "TinyFace"])
def test_it_is_found_under_the_roots_of_data(tmp_path, below, monkeypatch):
    write(tmp_path / "data" / below)
    assert find_tinyface(tmp_path / "data") == tmp_path / "data" / below
    monkeypatch.setenv("LRFACE_DATA", str(tmp_path / "data"))
    assert find_tinyface() == tmp_path / "data" / below


def test_where_it_is_missing_the_message_says_what_to_do(tmp_path):
    (tmp_path / "my data").mkdir()
    with pytest.raises(LrfaceError) as stop:
        find_tinyface(tmp_path / "my data")
    assert str(tmp_path / "my data/tinyface/Testing_Set") in str(stop.value)
    assert f"python data_prep/tinyface.py UNPACKED '{tmp_path / 'my data'}'" in str(stop.value)
