import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.model_selection import KFold

from lrface.align.warp import TEMPLATE_112
from lrface.benchmarks.protocols import read_pairs
from lrface.benchmarks.verification import evaluate_verification, load_benchmark
from lrface.data.packed import PackedSource, write_index, write_shard
from lrface.errors import LrfaceError

SIX_FACES = [(110, 330), (322, 211), (518, 333), (793, 410), (961, 132), (1181, 336)]


def crop(seed: int, size: int = 112) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[:, :, ::-1])


PAIRS = "2\t2\nA\t1\t2\nB\t1\t2\nA\t1\tB\t1\nA\t2\tB\t2\nC\t1\t2\nA\t1\t2\nC\t1\tA\t1\nB\t2\tC\t2\n"
LEFT = ["A 1", "B 1", "A 1", "A 2", "C 1", "A 1", "C 1", "B 2"]
RIGHT = ["A 2", "B 2", "B 1", "B 2", "C 2", "A 2", "A 1", "C 2"]
SAME = [True, True, False, False, True, True, False, False]


def seed_of(photograph: str) -> int:
    name, number = photograph.split()
    return 10 * ord(name) + int(number)


def write_crops(root: Path, suffix: str = ".png", size: int = 112) -> None:
    for name in "ABC":
        for number in (1, 2):
            save(root / name / f"{name}_{number:04d}{suffix}", crop(seed_of(f"{name} {number}"), size))


def check_pairs(benchmark) -> None:
    assert benchmark.same.tolist() == SAME and benchmark.folds.tolist() == [0] * 4 + [1] * 4
    assert len(benchmark.images) == 6
    for side, photographs in ((benchmark.left, LEFT), (benchmark.right, RIGHT)):
        for index, photograph in zip(side, photographs, strict=True):
            assert np.array_equal(benchmark.images[index], crop(seed_of(photograph)))


# pairs files


def test_pairs_in_the_format_of_lfw(tmp_path):
    (tmp_path / "pairs.txt").write_text(PAIRS)
    pairs = read_pairs(tmp_path / "pairs.txt")
    assert [" ".join(one) for one in pairs.left] == LEFT
    assert [" ".join(one) for one in pairs.right] == RIGHT
    assert pairs.same.tolist() == SAME and pairs.folds.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_pairs_without_folds_are_dealt_evenly(tmp_path):
    file = tmp_path / "pairs.txt"
    for first_line in ("4\n", "", "1\t4\n"):
        lines = PAIRS.split("\n", 1)[1].splitlines()
        file.write_text(first_line + "\n".join(sorted(lines)) + "\n\n")
        pairs = read_pairs(file)
        assert len(pairs.same) == 8 and sorted(pairs.folds) == list(range(8))


def test_names_with_blanks_need_tabs(tmp_path):
    (tmp_path / "pairs.txt").write_text("Ann Lee\t1\t2\nAnn Lee\t1\tBo\t3\n")
    pairs = read_pairs(tmp_path / "pairs.txt")
    assert pairs.left == [("Ann Lee", "1"), ("Ann Lee", "1")] and pairs.right == [
        ("Ann Lee", "2"),
        ("Bo", "3"),
    ]


@pytest.mark.parametrize(
    "text, found",
    [
        ("", "empty"),
        ("\n\n", "empty"),
        ("2\t2\nA\t1\t2\n", "announces 2 folds of 2 same and 2 different pairs, 8 in all; 1 found"),
        ("1\t1\nA\t1\t2\nB\t1\t2\n", "fold 1 has 2 same and 0 different"),
        ("3\nA\t1\t2\n", "announces 3 same"),
        ("A\t1\t2\nA\t1\t2\tB\t5\n", "line 2: .*found 5"),
        ("A\t1\t2\nA\t1\t\n", "line 2"),
        ("ten\t300\nA\t1\t2\n", "line 1: the first line is 'folds <tab> pairs'"),
        ("0\t300\n", "line 1"),
        ("A\t1\t2\n", "at least two"),
    ],
)
def test_broken_pairs_are_explained(tmp_path, text, found):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(LrfaceError, match=found) as stop:
        read_pairs(tmp_path / "pairs.txt")
    assert "pairs.txt" in str(stop.value)


def test_pairs_that_are_no_text(tmp_path):
    (tmp_path / "pairs.txt").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(LrfaceError, match="not a text file"):
        read_pairs(tmp_path / "pairs.txt")
    with pytest.raises(LrfaceError, match="cannot be read"):
        read_pairs(tmp_path / "absent.txt")


def test_the_official_pairs(shared):
    pairs = read_pairs(shared / "data/lfw/pairs.txt")
    assert len(pairs.same) == 6000 and pairs.same.sum() == 3000
    assert np.bincount(pairs.folds).tolist() == [600] * 10
    assert len({*pairs.left, *pairs.right}) == 7701
    people = [
        {name for name, _ in np.array(pairs.left)[pairs.folds == fold]}
        | {name for name, _ in np.array(pairs.right)[pairs.folds == fold]}
        for fold in range(10)
    ]
    # the splits that InsightFace's evaluation makes of the pairs in this order
    for fold, (_, test) in enumerate(KFold(n_splits=10, shuffle=False).split(np.arange(6000))):
        assert np.array_equal(np.flatnonzero(pairs.folds == fold), test)
    # View 2 is cut so that no person is in two folds
    assert sum(map(len, people)) == len(set.union(*people))


# aligned crops


@pytest.mark.parametrize("below", ["images", "."])
@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_a_folder_of_aligned_crops(tmp_path, below, suffix):
    write_crops(tmp_path / below, suffix)
    (tmp_path / "pairs.txt").write_text(PAIRS)
    benchmark = load_benchmark(tmp_path, cache=tmp_path / "cache", show_progress=False)
    check_pairs(benchmark)
    assert benchmark.unaligned == 0 and not (tmp_path / "cache").exists()


def test_small_faces_are_enlarged_whole_in_native_mode(tmp_path):
    sides = {("A", 1): (20, 24), ("A", 2): (31, 30), ("B", 1): (112, 112)}
    for name in "ABC":
        for number in (1, 2):
            height, width = sides.get((name, number), (14, 14))
            save(
                tmp_path / f"images/{name}/{name}_{number:04d}.png",
                crop(seed_of(f"{name} {number}"))[:height, :width],
            )
    (tmp_path / "pairs.txt").write_text(PAIRS)
    benchmark = load_benchmark(tmp_path, cache=tmp_path / "cache", show_progress=False, native=True)
    assert benchmark.unaligned == 6 and not (tmp_path / "cache").exists()
    assert benchmark.native is not None
    # the first pair is A 1 with A 2, the third A 1 with B 1
    assert benchmark.native[[benchmark.left[0], benchmark.right[0], benchmark.right[2]]].tolist() == [
        20,
        30,
        112,
    ]
    expected = cv2.resize(crop(seed_of("A 1"))[:20, :24], (112, 112), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(benchmark.images[benchmark.left[0]], expected)
    (tmp_path / "images/A/A_0002.png").write_bytes(b"no image")
    with pytest.raises(LrfaceError, match="A_0002.png"):
        load_benchmark(tmp_path, cache=tmp_path / "cache", show_progress=False, native=True)


def test_photographs_by_file_name(tmp_path):
    save(tmp_path / "A/first.png", crop(1))
    save(tmp_path / "A/7.png", crop(2))
    save(tmp_path / "B/x.png", crop(3))
    (tmp_path / "pairs.txt").write_text("A\tfirst.png\t7.png\nA\tfirst\tB\tx.png\n")
    benchmark = load_benchmark(tmp_path, show_progress=False)
    assert np.array_equal(benchmark.images[benchmark.right[1]], crop(3))
    assert np.array_equal(benchmark.images[benchmark.left[1]], crop(1))


def test_photographs_that_are_missing_are_named(tmp_path):
    write_crops(tmp_path / "images")
    (tmp_path / "pairs.txt").write_text(PAIRS)
    (tmp_path / "images/C/C_0002.png").unlink()
    with pytest.raises(LrfaceError, match="1 photographs that it names are not in .*images, the first: C 2"):
        load_benchmark(tmp_path, show_progress=False)
    (tmp_path / "pairs.txt").write_text("..\t1\t2\nA\t1\tB\t1\n")
    with pytest.raises(LrfaceError, match="2 photographs"):
        load_benchmark(tmp_path, show_progress=False)


# packed data


def write_packed(
    root: Path,
    photographs: list[str],
    size: int = 112,
    pattern: str = "{0}/{1}",
    landmarks: dict[str, np.ndarray] | None = None,
) -> None:
    root.mkdir(parents=True, exist_ok=True)
    names = sorted({photograph.split()[0] for photograph in photographs})
    records = []
    for photograph in photographs:
        name, number = photograph.split()
        for face in (1, 0):  # other faces of the photograph are packed too, and must not be taken
            image = crop(seed_of(photograph) + 1000 * face, size)
            records.append(
                {
                    "image": cv2.imencode(".png", image[:, :, ::-1])[1].tobytes(),
                    "label": names.index(name),
                    "identity": name,
                    "source": pattern.format(name, f"{name}_{int(number):04d}.jpg"),
                    "face": face,
                    "landmarks": (landmarks or {}).get(photograph, np.zeros(10, np.float32)),
                    "box": np.zeros(4, np.float32),
                    "score": 1.0,
                }
            )
    shard = write_shard(root / "shard-00000.arrow", records)
    write_index(root, image_size=(size, size), identities=names, shards=[shard])


@pytest.mark.parametrize("pattern", ["{0}/{1}", "images/{0}/{1}", "{0}/2003/{1}"])
def test_packed_data_with_pairs(tmp_path, pattern):
    write_packed(tmp_path, sorted({*LEFT, *RIGHT}), pattern=pattern)
    (tmp_path / "pairs.txt").write_text(PAIRS)
    benchmark = load_benchmark(tmp_path)
    check_pairs(benchmark)
    assert benchmark.unaligned == 0 and benchmark.name == tmp_path.name


def test_packed_data_knows_native_sizes_by_landmarks(tmp_path):
    """A face whose landmarks are the template's halved is 56 pixels of photograph, wherever it lies."""
    half = (TEMPLATE_112 * 0.5 + 7).astype(np.float32).reshape(10)
    write_packed(tmp_path, sorted({*LEFT, *RIGHT}), landmarks={"A 1": half})
    (tmp_path / "pairs.txt").write_text(PAIRS)
    benchmark = load_benchmark(tmp_path)
    assert benchmark.native is not None
    assert benchmark.native[benchmark.left[0]] == pytest.approx(56, rel=1e-4)
    assert np.isnan(benchmark.native[benchmark.right]).sum() == 7  # all but the one that shows A 1 again


def test_packed_data_with_pairs_elsewhere(tmp_path):
    write_packed(tmp_path / "packed", sorted({*LEFT, *RIGHT}))
    (tmp_path / "protocol.txt").write_text(PAIRS)
    check_pairs(load_benchmark(tmp_path / "packed", pairs=tmp_path / "protocol.txt"))


def test_a_photograph_without_a_face_keeps_its_pairs(tmp_path):
    write_packed(tmp_path, sorted({*LEFT, *RIGHT} - {"C 2"}))
    (tmp_path / "pairs.txt").write_text(PAIRS)
    benchmark = load_benchmark(tmp_path)
    assert benchmark.unaligned == 1 and len(benchmark) == 8
    grey = benchmark.images[benchmark.right[4]]
    assert grey.min() == grey.max()
    rows = evaluate_verification(
        lambda images: images.flatten(1)[:, ::997] - 0.5, benchmark, (112,), progress=False
    ).rows
    assert rows[0]["unaligned"] == 1 and rows[0]["pairs"] == 8


def test_packed_data_that_does_not_belong_to_the_pairs(tmp_path):
    write_packed(tmp_path, ["A 1", "A 2", "B 1"])
    (tmp_path / "pairs.txt").write_text(PAIRS)
    with pytest.raises(LrfaceError, match="3 of 6 photographs that the pairs name have no face"):
        load_benchmark(tmp_path)
    write_packed(tmp_path, sorted({*LEFT, *RIGHT}), size=96)
    with pytest.raises(LrfaceError, match="96x96 pixels, 112x112 are needed"):
        load_benchmark(tmp_path)


# photographs


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """The six people of insightface's group photograph, two versions of each, as photographs of their own."""
    spec = importlib.util.find_spec("insightface")
    if spec is None or spec.origin is None:
        pytest.skip("insightface, whose group photograph this test uses, is not installed")
    group = cv2.imread(str(Path(spec.origin).parent / "data/images/t1.jpg"))
    assert group is not None
    root = tmp_path_factory.mktemp("photographs")
    for number, (x, y) in enumerate(SIX_FACES):
        name = f"Person_{number}"
        for version in (1, 2):
            top, left = max(0, y - 110 + 9 * version), max(0, x - 110 - 7 * version)
            photo = group[top : top + 220, left : left + 220]
            photo = cv2.convertScaleAbs(photo, alpha=1.0 if version == 1 else 0.8, beta=0)
            save(root / f"images/{name}/{name}_{version:04d}.jpg", photo[:, :, ::-1])
    lines = [f"Person_{i}\t1\t2\nPerson_{i}\t1\tPerson_{(i + 1) % 6}\t2" for i in range(6)]
    (root / "pairs.txt").write_text("\n".join(lines) + "\n")
    return root


def test_photographs_are_aligned_once(photographs, tmp_path, monkeypatch):
    benchmark = load_benchmark(photographs, cache=tmp_path / "cache", workers=1, show_progress=False)
    assert benchmark.images.shape == (12, 112, 112, 3)
    assert benchmark.unaligned == 0 and benchmark.same.sum() == 6
    (packed,) = (tmp_path / "cache/aligned").iterdir()  # the folder of links is gone
    assert len(PackedSource(packed)) == 12
    assert packed.name.startswith(photographs.name + "-")

    # both versions of a face land on the same template: their crops are nearly the same picture
    def grey(index: int) -> np.ndarray:
        image = cv2.GaussianBlur(benchmark.images[index], (0, 0), 2).mean(axis=2)
        return (image - image.mean()) / image.std()

    for left, right, same in zip(benchmark.left, benchmark.right, benchmark.same, strict=True):
        correlation = float((grey(left) * grey(right)).mean())
        assert correlation > 0.9 if same else correlation < 0.9

    def not_again(*arguments, **named):
        raise AssertionError("aligned again")

    monkeypatch.setattr("lrface.align.pipeline.align_folder", not_again)
    again = load_benchmark(photographs, cache=tmp_path / "cache", show_progress=False)
    assert np.array_equal(again.images, benchmark.images)
    with pytest.raises(AssertionError, match="aligned again"):
        load_benchmark(photographs, cache=tmp_path / "other cache", show_progress=False)


def test_a_photograph_without_a_face_is_cut_where_faces_usually_are(photographs, tmp_path):
    import shutil

    root = tmp_path / "with_landscape"
    shutil.copytree(photographs, root)
    landscape = np.zeros((220, 220, 3), dtype=np.uint8)
    landscape[:, :, 2] = np.arange(220)[:, None]
    save(root / "images/Person_3/Person_0003.jpg", landscape)
    text = (root / "pairs.txt").read_text()
    (root / "pairs.txt").write_text(text + "Person_3\t1\tPerson_0003.jpg\n")
    benchmark = load_benchmark(root, cache=tmp_path / "cache", workers=1, show_progress=False)
    assert benchmark.unaligned == 1 and len(benchmark.images) == 13
    cut = benchmark.images[benchmark.right[-1]].astype(int)
    assert cut[:, :, :2].max() < 30  # blue only, still in RGB order
    # the middle of the photograph is in the middle of the crop, and down stays down
    assert 60 < cut[56, 56, 2] < 160 and cut[100, 56, 2] > cut[10, 56, 2] + 20


def test_the_cache_notices_changed_photographs(photographs, tmp_path):
    from lrface.benchmarks.lfw import cache_name
    from lrface.benchmarks.locate import locate_benchmark

    paths = ["Person_0/Person_0_0001.jpg", "Person_1/Person_1_0001.jpg"]
    found = locate_benchmark(photographs)
    first = cache_name(found.name, found.path, paths)
    assert first == cache_name(found.name, found.path, paths)
    assert first != cache_name(found.name, found.path, paths[:1])


@pytest.mark.slow
def test_the_oracle_scores_on_lfw_what_is_published(shared, tmp_path_factory):
    """A public MobileFaceNet on LFW View 2 from raw photographs; about half an hour on two cores."""
    import os

    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(shared / "oracle/mobilefacenet_ms1m.onnx"))

    def embed(images):
        return torch.from_numpy(session.run(None, {"image": images.numpy()})[0])

    cache = os.environ.get("LRFACE_CACHE") or tmp_path_factory.mktemp("cache")
    benchmark = load_benchmark("lfw", data=shared / "data", cache=cache)
    assert benchmark.unaligned <= 1
    rows = evaluate_verification(embed, benchmark).rows
    expected = {112: (99.42, 0.15), 56: (99.08, 0.2), 28: (94.5, 0.6), 14: (76.9, 0.8)}
    for row in rows:
        value, tolerance = expected[row["probe_size"]]
        assert abs(row["accuracy"] - value) <= tolerance, row
