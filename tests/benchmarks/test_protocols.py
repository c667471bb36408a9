"""Protocols in their official formats; raw layouts and packs of the same benchmark."""

import random
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io

from lrface.benchmarks.lfw import missing_photographs
from lrface.benchmarks.locate import locate_benchmark
from lrface.benchmarks.packs import benchmark_to_pack, read_pack, write_pack
from lrface.benchmarks.protocols import agedb_name, read_agedb, read_cfp, read_protocol
from lrface.benchmarks.verification import load_benchmark
from lrface.data.synthetic import draw_face
from lrface.errors import LrfaceError, UsageError


@pytest.fixture(autouse=True)
def no_other_data(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LRFACE_DATA", raising=False)
    monkeypatch.delenv("LRFACE_CACHE", raising=False)


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])


def save_face(path: Path, identity: int, number: int) -> None:
    save(path, draw_face(0, identity, number))


# CFP

CFP_FOLDS = {  # frontal photographs 1 to 8: two of each of four people; profile ones 1 to 4: one of each
    "FP/01/same.txt": "1,1\n4,2\n",
    "FP/01/diff.txt": "2,2\n3,1\n",
    "FP/02/same.txt": "5,3\n7,4\n",
    "FP/02/diff.txt": "8,3\n6,4\n",
    "FF/01/same.txt": "2,1\n3,4\n",
    "FF/01/diff.txt": "1,4\n2,3\n",
    "FF/02/same.txt": "6,5\n7,8\n",
    "FF/02/diff.txt": "5,8\n7,6\n",
}
FP_PAIRS = [(1, 1), (4, 2), (2, 2), (3, 1), (5, 3), (7, 4), (8, 3), (6, 4)]
FF_PAIRS = [(2, 1), (3, 4), (1, 4), (2, 3), (6, 5), (7, 8), (5, 8), (7, 6)]
SAME = [True, True, False, False] * 2


def write_cfp_protocol(root: Path) -> None:
    for name, text in CFP_FOLDS.items():
        file = root / "Protocol/Split" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    frontal = [
        f"{2 * person + number - 2} ../Data/Images/{person:03d}/frontal/{number:02d}.jpg\n"
        for person in range(1, 5)
        for number in (1, 2)
    ]
    profile = [f"{person} ../Data/Images/{person:03d}/profile/01.jpg\n" for person in range(1, 5)]
    (root / "Protocol/Pair_list_F.txt").write_text("".join(frontal))
    (root / "Protocol/Pair_list_P.txt").write_text("".join(profile))


def cfp_photograph(kind: str, number: int) -> np.ndarray:
    person, which = (number - 1, 9) if kind == "profile" else divmod(number - 1, 2)
    return draw_face(0, person, which)


def write_cfp(root: Path, suffix: str = ".png") -> None:
    write_cfp_protocol(root)
    for person in range(4):
        for which in (0, 1):
            save_face(root / f"Data/Images/{person + 1:03d}/frontal/{which + 1:02d}{suffix}", person, which)
        save_face(root / f"Data/Images/{person + 1:03d}/profile/01{suffix}", person, 9)


@pytest.mark.parametrize("name, pairs", [("cfp_fp", FP_PAIRS), ("cfp_ff", FF_PAIRS)])
@pytest.mark.parametrize("below", ["cfp", "cfp-dataset", "cfp_ff", "."])
def test_cfp_from_its_official_layout_and_from_a_pack(tmp_path, name, pairs, below):
    write_cfp(tmp_path / "data" / below)
    raw = load_benchmark(name, data=tmp_path / "data", show_progress=False)
    assert raw.name == name and raw.unaligned == 0
    assert raw.same.tolist() == SAME and raw.folds.tolist() == [0] * 4 + [1] * 4
    second = "profile" if name == "cfp_fp" else "frontal"
    for index, (left, right) in enumerate(pairs):
        assert np.array_equal(raw.images[raw.left[index]], cfp_photograph("frontal", left))
        assert np.array_equal(raw.images[raw.right[index]], cfp_photograph(second, right))
    assert len(raw.images) == len({("frontal", a) for a, _ in pairs} | {(second, b) for _, b in pairs})

    (tmp_path / "packs").mkdir()
    assert benchmark_to_pack(name, tmp_path / f"packs/{name}.bin", data=tmp_path / "data") == 8
    pack = load_benchmark(name, data=tmp_path / "packs")
    assert pack.origin.endswith(".bin")
    assert pack.same.tolist() == raw.same.tolist()
    assert np.array_equal(pack.images[pack.left], raw.images[raw.left])
    assert np.array_equal(pack.images[pack.right], raw.images[raw.right])


def test_the_official_pairs_of_cfp(shared):
    protocol = shared / "data/formats/cfp_protocol"
    for split in ("FP", "FF"):
        pairs = read_cfp(protocol / "Split" / split)
        assert len(pairs) == 7000 and np.bincount(pairs.folds).tolist() == [700] * 10
        assert pairs.same.tolist() == ([True] * 350 + [False] * 350) * 10
        assert {folder.split("/")[1] for folder, _ in pairs.left} == {"frontal"}
        assert {folder.split("/")[1] for folder, _ in pairs.right} == {
            "profile" if split == "FP" else "frontal"
        }
        people = [
            {
                folder.split("/")[0]
                for side in (pairs.left, pairs.right)
                for (folder, _), of_fold in zip(side, pairs.folds == fold, strict=True)
                if of_fold
            }
            for fold in range(10)
        ]
        assert sum(map(len, people)) == len(set.union(*people)) == 500  # folds share nobody


@pytest.mark.parametrize("folds", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_the_official_protocol_with_drawn_faces_is_the_same_from_raw_and_pack(shared, tmp_path, folds):
    """The official pairs of CFP-FP (all 7,000 with ten folds): crops in the official layout, and a pack written by
    the test in the order of the protocol's files, as this test itself reads them."""
    protocol = shared / "data/formats/cfp_protocol"
    root = tmp_path / "raw/cfp"
    shutil.copytree(protocol, root / "Protocol")
    for fold in range(folds + 1, 11):
        shutil.rmtree(root / f"Protocol/Split/FP/{fold:02d}")
    paths = {
        kind: dict(line.split() for line in (protocol / f"Pair_list_{kind}.txt").read_text().splitlines())
        for kind in "FP"
    }
    same: list[bool] = []
    sides: list[str] = []
    for fold in range(1, folds + 1):
        for name, label in (("same", True), ("diff", False)):
            for line in (protocol / f"Split/FP/{fold:02d}/{name}.txt").read_text().split():
                frontal, profile = line.split(",")
                sides += [paths["F"][frontal], paths["P"][profile]]
                same.append(label)
    encoded: dict[str, bytes] = {}
    faces = [draw_face(0, person, 0) for person in range(100)]
    for number, path in enumerate(dict.fromkeys(sides)):
        image = faces[number % 100].copy()
        image[:8, :8] = number // 256, number % 256, 128  # every photograph is another picture
        file = root / "Protocol" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        encoded[path] = cv2.imencode(".png", image[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 0])[1].tobytes()
        file.with_suffix(".png").write_bytes(encoded[path])
    write_pack(tmp_path / "packs/cfp_fp.bin", [encoded[path] for path in sides], same)

    raw = load_benchmark("cfp_fp", data=tmp_path / "raw", show_progress=False)
    pack = load_benchmark("cfp_fp", data=tmp_path / "packs")
    assert len(raw) == len(pack) == 700 * folds
    assert len(raw.images) == len(pack.images) == len(encoded)
    assert raw.same.tolist() == pack.same.tolist() == same
    assert raw.folds.tolist() == np.repeat(np.arange(folds), 700).tolist()
    assert folds < 10 or pack.folds.tolist() == raw.folds.tolist()
    for side in ("left", "right"):
        in_raw, in_pack = getattr(raw, side), getattr(pack, side)
        _, positions = np.unique(in_raw, return_index=True)  # images are distinct: one look at each is enough
        assert np.array_equal(raw.images[in_raw[positions]], pack.images[in_pack[positions]])
        mapping = dict(zip(in_raw.tolist(), in_pack.tolist(), strict=True))
        assert [mapping[index] for index in in_raw.tolist()] == in_pack.tolist()


def test_a_folder_of_cfp_holds_two_benchmarks(tmp_path):
    write_cfp(tmp_path / "cfp-dataset")
    with pytest.raises(UsageError, match="cfp_fp and cfp_ff; name one: --benchmark cfp_fp --data"):
        locate_benchmark(tmp_path / "cfp-dataset")
    found = locate_benchmark(tmp_path / "cfp-dataset", pairs=tmp_path / "cfp-dataset/Protocol/Split/FF")
    assert found.pairs == tmp_path / "cfp-dataset/Protocol/Split/FF"
    shutil.rmtree(tmp_path / "cfp-dataset/Protocol/Split/FP")
    assert locate_benchmark(tmp_path / "cfp-dataset").name == "cfp_ff"


def test_raw_comes_before_the_pack_of_the_same_root(tmp_path):
    write_cfp(tmp_path / "cfp")
    (tmp_path / "cfp_fp.bin").write_bytes(b"x")
    assert locate_benchmark("cfp_fp", data=tmp_path).kind == "folder"
    assert locate_benchmark("cfp_fp.bin", data=tmp_path).kind == "pack"


def test_a_missing_raw_benchmark_says_which_script_prepares_it(tmp_path):
    (tmp_path / "data").mkdir()
    for name, place in [
        ("cfp_fp", "cfp/Protocol/Split/FP"),
        ("agedb30", "agedb30/04_FINAL_protocol_30_years.mat"),
        ("calfw", "calfw/pairs_CALFW.txt"),
        ("cplfw", "cplfw/pairs_CPLFW.txt"),
    ]:
        with pytest.raises(LrfaceError) as stop:
            locate_benchmark(name, data=tmp_path / "data")
        assert str(tmp_path / "data" / place) in str(stop.value)
        script = "cfp_fp" if name == "cfp_ff" else name
        assert f"python data_prep/{script}.py UNPACKED {tmp_path / 'data'}" in str(stop.value)
        assert (Path(__file__).parents[2] / f"data_prep/{script}.py").is_file()


@pytest.mark.parametrize(
    "name, text, found",
    [
        ("Split/FP/01/same.txt", "1,1\n4;2\n", "same.txt, line 2: two numbers"),
        ("Split/FP/01/same.txt", "1,1\n4,²\n", "same.txt, line 2: two numbers"),
        ("Split/FP/01/same.txt", "1,1\n9,2\n", "line 2: Pair_list_F.txt has no photograph 9"),
        ("Split/FP/01/same.txt", "1,1\n1,5\n", "line 2: Pair_list_P.txt has no photograph 5"),
        ("Split/FP/01/same.txt", "1,2\n", "of 001 and 002, which contradicts same.txt"),
        ("Split/FP/02/diff.txt", "1,1\n", "of 001 and 001, which contradicts diff.txt"),
        ("Split/FP/02/diff.txt", None, "diff.txt: cannot be read"),
        ("Split/FP/04/diff.txt", "", "01, 02 .*found 01, 02, 04"),
        ("Pair_list_F.txt", "", "empty"),
        ("Pair_list_P.txt", None, "cannot be read"),
        ("Pair_list_F.txt", "1 ../Data/Images/001/frontal/01.jpg\n1 a/b/c.jpg\n", "line 2: .* listed twice"),
        ("Pair_list_F.txt", "1 ../../frontal/01.jpg\n", "line 1: '1 ../Data/Images/"),
        ("Pair_list_F.txt", "one 001/frontal/01.jpg\n", "line 1"),
        ("Pair_list_F.txt", "1 001/frontal/passwd\n", "line 1"),
    ],
)
def test_broken_protocols_of_cfp_are_explained(tmp_path, name, text, found):
    write_cfp_protocol(tmp_path)
    file = tmp_path / "Protocol" / name
    if text is None:
        file.unlink()
    else:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    with pytest.raises(LrfaceError, match=found) as stop:
        read_cfp(tmp_path / "Protocol/Split/FP")
    assert str(tmp_path) in str(stop.value)
    with pytest.raises(LrfaceError, match="FP and Protocol/Split/FF"):
        read_cfp(tmp_path / "Protocol")


def test_missing_photographs_of_cfp_are_named(tmp_path):
    write_cfp(tmp_path / "cfp")
    (tmp_path / "cfp/Data/Images/002/profile/01.png").unlink()
    with pytest.raises(LrfaceError, match="1 photographs that it names are not in .*002/profile/01.jpg"):
        load_benchmark("cfp_fp", data=tmp_path, show_progress=False)


# CALFW and CPLFW

CALFW = [("A_0001", "A_0002", 1), ("B_0001", "B_0002", 2), ("C_0001", "C_0002", 2), ("D_0001", "D_0002", 1)]
CALFW += [("A_0001", "B_0002", 0), ("C_0001", "A_0002", 0), ("B_0001", "D_0001", 0), ("D_0002", "C_0002", 0)]
# fold by fold, same before different
CALFW_ORDER = [0, 3, 4, 5, 1, 2, 6, 7]


def write_two_lines(file: Path, pairs: list[tuple[str, str, int]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{one}.jpg {mark}\n{two}.jpg {mark}\n" for one, two, mark in pairs))


@pytest.mark.parametrize(
    "images",
    ["images", "aligned images", "images&landmarks/images", "images&landmarks/images&landmarks/images"],
)
def test_calfw_from_its_official_layout(tmp_path, images):
    write_two_lines(tmp_path / "calfw/pairs_CALFW.txt", CALFW)
    names = sorted({name for pair in CALFW for name in pair[:2]})
    for number, name in enumerate(names):
        save_face(tmp_path / "calfw" / images / f"{name}.png", number, 0)
    (tmp_path / "calfw/images&landmarks").mkdir(exist_ok=True)  # beside, without images
    benchmark = load_benchmark("calfw", data=tmp_path, show_progress=False)
    assert benchmark.same.tolist() == [CALFW[index][2] > 0 for index in CALFW_ORDER]
    assert benchmark.folds.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    for position, index in enumerate(CALFW_ORDER):
        one, two = (draw_face(0, names.index(name), 0) for name in CALFW[index][:2])
        assert np.array_equal(benchmark.images[benchmark.left[position]], one)
        assert np.array_equal(benchmark.images[benchmark.right[position]], two)
    assert locate_benchmark(tmp_path / "calfw").name == "calfw"


def test_cplfw_marks_carry_no_folds(tmp_path):
    pairs = [(f"P_{index}", f"Q_{index}", int(index < 30)) for index in range(60)]
    write_two_lines(tmp_path / "pairs_CPLFW.txt", pairs)
    read = read_protocol(tmp_path / "pairs_CPLFW.txt")
    assert np.bincount(read.folds).tolist() == [6] * 10
    assert read.same.tolist() == [True, True, True, False, False, False] * 10
    assert read.left[:7] == [("", f"P_{index}.jpg") for index in (0, 1, 2, 30, 31, 32, 3)]


def test_twenty_folds_of_marks_as_in_the_official_calfw(tmp_path):
    pairs = [(f"P_{index}", f"Q_{index}", index // 3 + 1 if index < 30 else 0) for index in range(60)]
    write_two_lines(tmp_path / "pairs_CALFW.txt", pairs)
    read = read_protocol(tmp_path / "pairs_CALFW.txt")
    assert read.folds.tolist() == np.repeat(np.arange(10), 6).tolist()
    assert read.same.tolist() == [True, True, True, False, False, False] * 10


@pytest.mark.parametrize(
    "text, found",
    [
        ("a.jpg 1\nb.jpg 1\nc.jpg 0\n", "line 3: the second photograph of the last pair is missing"),
        ("a.jpg 1\nb.jpg 0\n", "lines 1 and 2: .* marks 1 and 0"),
        ("a.jpg 1\nb.jpg\n", "line 2: 'FILE.jpg MARK'"),
        ("a.jpg 1\nb.jpg -1\n", "line 2"),
        ("a.jpg 1\nb.jpg " + "9" * 5000 + "\n", "line 2"),
        ("a.jpg 1\nb.jpg 1\n", "at least two"),
    ],
)
def test_broken_lists_of_two_lines_are_explained(tmp_path, text, found):
    (tmp_path / "pairs_CALFW.txt").write_text(text)
    with pytest.raises(LrfaceError, match=found) as stop:
        read_protocol(tmp_path / "pairs_CALFW.txt")
    assert len(str(stop.value)) < 700


# lists of pairs


@pytest.mark.parametrize("separator", [" ", "\t", ","])
def test_a_list_of_pairs(tmp_path, separator):
    lines = [("a/1.jpg", "a/2.jpg", "1"), ("a/1.jpg", "b.png", "0"), ("b.png", "c/d/1.jpg", "-1")]
    (tmp_path / "list.txt").write_text("\n".join(separator.join(line) for line in lines) + "\n")
    pairs = read_protocol(tmp_path / "list.txt")
    assert pairs.left == [("a", "1.jpg"), ("a", "1.jpg"), ("", "b.png")]
    assert pairs.right == [("a", "2.jpg"), ("", "b.png"), ("c/d", "1.jpg")]
    assert pairs.same.tolist() == [True, False, False] and sorted(pairs.folds) == [0, 1, 2]


def test_folds_of_a_list_are_blocks_where_every_block_has_both_kinds(tmp_path):
    for labels, expected in (("10" * 20, np.repeat(np.arange(10), 4)), ("1" * 20 + "0" * 20, None)):
        (tmp_path / "list.txt").write_text(
            "".join(f"{n}.jpg x{n}.jpg {label}\n" for n, label in enumerate(labels))
        )
        folds = read_protocol(tmp_path / "list.txt").folds
        assert np.bincount(folds).tolist() == [4] * 10
        assert expected is None or folds.tolist() == expected.tolist()


def test_a_list_cannot_lead_out_of_the_folder(tmp_path):
    save_face(tmp_path / "outside.png", 0, 0)
    save_face(tmp_path / "set/images/a.png", 1, 0)
    for escape in (
        "../../outside.png",
        f"{tmp_path}/outside.png",
        "./../../outside.png",
        "a/../../../outside.png",
    ):
        (tmp_path / "list.txt").write_text(f"a.png {escape} 1\na.png a.png 0\n")
        with pytest.raises(LrfaceError, match="1 photographs"):
            load_benchmark(tmp_path / "set", pairs=tmp_path / "list.txt", show_progress=False)


# AgeDB


def cell(items: list, shape: tuple[int, ...] = (-1, 1)) -> np.ndarray:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array.reshape(shape)


AGEDB = [
    [("1_Ann_1_A_20", "1_Ann_2_A_60", 1), ("2_Bo_7_A_18", "1_Ann_1_A_20", -1)],
    [("1_Ann_2_A_60", "2_Bo_7_A_18", -1), ("2_Bo_7_A_18", "2_Bo_8_A_50", 1)],
]


def write_agedb(file: Path, splits: list = AGEDB, compress: bool = True) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = []
    for split in splits:
        sides = [{"name": pair[side], "age": int(pair[side][-2:])} for side in (0, 1) for pair in split]
        labels = np.array([[pair[2] for pair in split]], dtype=np.int8)
        content.append({"pairs": cell(sides, (2, len(split))), "annot": labels})
    scipy.io.savemat(file, {"splits": cell(content)}, do_compression=compress)


@pytest.mark.parametrize("compress", [True, False])
def test_agedb_from_its_official_layout(tmp_path, compress):
    write_agedb(tmp_path / "AgeDB/04_FINAL_protocol_30_years.mat", compress=compress)
    names = sorted({name for split in AGEDB for pair in split for name in pair[:2]})
    for number, name in enumerate(names):
        save_face(tmp_path / f"AgeDB/03_Protocol_Images/{name}.png", number, 0)
    benchmark = load_benchmark("agedb30", data=tmp_path, show_progress=False)
    # AgeDB's own order: pairs of a split are not sorted
    assert benchmark.same.tolist() == [True, False, False, True] and benchmark.folds.tolist() == [0, 0, 1, 1]
    for index, (one, two, _) in enumerate(pair for split in AGEDB for pair in split):
        assert np.array_equal(
            benchmark.images[benchmark.left[index]], draw_face(0, names.index(one), 0)
        ) and np.array_equal(benchmark.images[benchmark.right[index]], draw_face(0, names.index(two), 0))
    assert locate_benchmark(tmp_path / "AgeDB").name == "agedb30"


def test_photographs_of_agedb_by_their_own_names(tmp_path):
    """The photographs as AgeDB gives them out now (ID_NAME_AGE_GENDER), with a list of pairs."""
    for number, name in enumerate(("0_MariaCallas_35_f", "0_MariaCallas_41_f", "1_LaurenBacall_60_f")):
        save_face(tmp_path / f"agedb/images/{name}.png", number, 0)
    (tmp_path / "pairs.csv").write_text(
        "0_MariaCallas_35_f.jpg,0_MariaCallas_41_f.jpg,1\n0_MariaCallas_35_f.jpg,1_LaurenBacall_60_f.jpg,0\n"
    )
    benchmark = load_benchmark(tmp_path / "agedb", pairs=tmp_path / "pairs.csv", show_progress=False)
    assert np.array_equal(benchmark.images[benchmark.right[1]], draw_face(0, 2, 0))
    assert agedb_name("0_MariaCallas_35_f") == (0, "MariaCallas", 35, "f")
    assert agedb_name("14_Jean_Marc_Barr_101_m") == (14, "Jean_Marc_Barr", 101, "m")
    assert agedb_name("1_Ann_2_A_60") is None and agedb_name("MariaCallas_35") is None


@pytest.mark.parametrize(
    "splits, found",
    [
        ([], "'splits' of AgeDB's protocols is expected"),
        ([[("1_Ann_1_A_20", "1_Ann_2_A_60", 5)]], "split 1, pair 1: .* and 5"),
        ([[("../1_Ann_1_A_20", "1_Ann_2_A_60", 1)]], "split 1, pair 1"),
        ([[("1_Ann_1_A_20", "1_Ann_2_A_60", 1)]], "1 pairs; at least two"),
    ],
)
def test_broken_protocols_of_agedb_are_explained(tmp_path, splits, found):
    write_agedb(tmp_path / "x.mat", splits)
    with pytest.raises(LrfaceError, match=found):
        read_agedb(tmp_path / "x.mat")


def test_other_content_of_a_matlab_file_is_no_protocol(tmp_path):
    for content, found in [
        ({"x": np.arange(3)}, "found 'x'"),
        ({"splits": np.arange(3)}, "'splits'"),
        ({"splits": cell([{"pairs": np.arange(4)}])}, "split 1: 'pairs'"),
        ({"splits": cell([{"pairs": cell(["a", "b"], (2, 1)), "annot": np.arange(3)}])}, "'annot' with 1"),
        ({"splits": cell([{"pairs": cell(["a", "b"], (2, 1)), "annot": np.ones(1)}])}, "pair 1"),
    ]:
        scipy.io.savemat(tmp_path / "x.mat", content)
        with pytest.raises(LrfaceError, match=found):
            read_protocol(tmp_path / "x.mat")


# photographs, and packed data


def test_photographs_in_one_folder_are_aligned(tmp_path):
    """CALFW's photographs lie in one folder without identities; the aligner finds the faces there too."""
    import importlib.util

    spec = importlib.util.find_spec("insightface")
    if spec is None or spec.origin is None:
        pytest.skip("insightface, whose group photograph this test uses, is not installed")
    group = cv2.imread(str(Path(spec.origin).parent / "data/images/t1.jpg"))[:, :, ::-1]
    places = {"A_0001": (110, 330), "B_0001": (322, 211), "C_0001": (518, 333)}
    for name, (x, y) in places.items():
        save(
            tmp_path / f"calfw/images/{name}.jpg", group[max(0, y - 110) : y + 110, max(0, x - 110) : x + 110]
        )
    save(tmp_path / "calfw/images/D_0001.jpg", np.full((220, 220, 3), (0, 0, 255), np.uint8))
    pairs = [("A_0001", "B_0001", 1), ("B_0001", "C_0001", 0), ("A_0001", "D_0001", 0)]
    write_two_lines(tmp_path / "calfw/pairs_CALFW.txt", pairs)
    benchmark = load_benchmark(
        "calfw", data=tmp_path, cache=tmp_path / "cache", workers=1, show_progress=False
    )
    assert len(benchmark.images) == 4 and benchmark.unaligned == 1
    blue = benchmark.images[3]
    assert blue[:, :, 2].min() > 200 and blue[:, :, :2].max() < 60
    assert benchmark.images[:3].std(axis=(1, 2, 3)).min() > 20


def test_packed_data_serves_every_protocol(tmp_path):
    """What `lrface align` made of Data/Images, beside CFP's protocol."""
    from lrface.data.packed import write_index, write_shard

    write_cfp_protocol(tmp_path / "cfp")
    records = []
    for person in range(4):
        for kind, which in (("frontal/01", 0), ("frontal/02", 1), ("profile/01", 9)):
            image = draw_face(0, person, which)
            records.append(
                {
                    "image": cv2.imencode(".png", image[:, :, ::-1])[1].tobytes(),
                    "label": person,
                    "identity": f"{person + 1:03d}",
                    "source": f"{person + 1:03d}/{kind}.jpg",
                    "face": 0,
                    "landmarks": np.zeros(10, np.float32),
                    "box": np.zeros(4, np.float32),
                    "score": 1.0,
                }
            )
    packed = tmp_path / "cfp/images"
    packed.mkdir()
    shard = write_shard(packed / "shard-00000.arrow", records)
    write_index(packed, image_size=(112, 112), identities=[f"{n:03d}" for n in range(1, 5)], shards=[shard])
    benchmark = load_benchmark("cfp_fp", data=tmp_path, show_progress=False)
    assert benchmark.unaligned == 0
    for index, (left, right) in enumerate(FP_PAIRS):
        assert np.array_equal(benchmark.images[benchmark.left[index]], cfp_photograph("frontal", left))
        assert np.array_equal(benchmark.images[benchmark.right[index]], cfp_photograph("profile", right))


def test_missing_photographs_lists_both_kinds_of_names(tmp_path):
    save_face(tmp_path / "images/A/A_0001.png", 0, 0)
    (tmp_path / "pairs.txt").write_text("A\t1\t2\nA\t1\tB\t3\n")
    assert missing_photographs(read_protocol(tmp_path / "pairs.txt"), tmp_path / "images") == ["A 2", "B 3"]
    (tmp_path / "list.txt").write_text("A/A_0001.jpg x/y.jpg 1\nz.jpg A/A_0001.jpg 0\n")
    assert missing_photographs(read_protocol(tmp_path / "list.txt"), tmp_path / "images") == [
        "z.jpg",
        "x/y.jpg",
    ]


# writing packs


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_written_pack_is_read(tmp_path, protocol):
    images = [b"\xff\xd8 one", b"two" * 1000, b"\xff\xd8 one", b"3"]
    write_pack(tmp_path / "x.bin", images, np.array([True, False]), protocol=protocol)
    read, same = read_pack(tmp_path / "x.bin")
    assert read == images and same.tolist() == [True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_a_pack_stores_an_image_of_many_pairs_once(tmp_path):
    image = bytes(random.Random(0).randbytes(100_000))
    write_pack(tmp_path / "x.bin", [image] * 40, [True] * 20)
    assert (tmp_path / "x.bin").stat().st_size < 102_000
    assert read_pack(tmp_path / "x.bin")[0] == [image] * 40


def test_what_is_no_pack_is_not_written(tmp_path):
    for images, same, found in [
        ([b"a"], [True], "1 images for 1 pairs"),
        ([], [], "0 images"),
        ([b"a", b""], [True], "image 1 must be encoded"),
        ([b"a", "b"], [True], "image 1"),
    ]:
        with pytest.raises(LrfaceError, match=found):
            write_pack(tmp_path / "x.bin", images, same)
    with pytest.raises(UsageError, match="protocol"):
        write_pack(tmp_path / "x.bin", [b"a", b"b"], [True], protocol=5)
    assert not list(tmp_path.iterdir())


def test_verify_gives_the_same_row_from_raw_and_from_the_pack(shared, tmp_path):
    import json

    from typer.testing import CliRunner

    from lrface.cli import app

    write_cfp(tmp_path / "raw/cfp")
    (tmp_path / "packs").mkdir()
    benchmark_to_pack("cfp_fp", tmp_path / "packs/cfp_fp.bin", data=tmp_path / "raw")
    model = str(shared / "oracle/mobilefacenet_ms1m.onnx")
    rows = []
    for data in ("raw", "packs"):
        arguments = [
            "verify",
            "--benchmark",
            "cfp_fp",
            "--data",
            str(tmp_path / data),
            "--model",
            model,
            "--json",
        ]
        done = CliRunner().invoke(app, [*arguments, "--resolutions", "112,28"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        rows.append(json.loads(done.stdout)["results"])
    for raw, pack in zip(*rows, strict=True):
        assert raw["pairs"] == pack["pairs"] == 8 and raw["unaligned"] == pack["unaligned"] == 0
        # by folds the accuracies may differ: this protocol has two folds, and a pack always ten blocks
        assert raw["auc"] == pack["auc"] and raw["eer"] == pack["eer"]
