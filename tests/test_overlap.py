"""Overlap of a training set with a benchmark: every kind of leak is planted and found, and nothing else."""

import csv
import json
import pickle
import statistics

import cv2
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lrface import load_embedder
from lrface.benchmarks.images import open_images
from lrface.cli import app
from lrface.data.sheet import GAP, LABEL_WIDTH, MARGIN, TILE
from lrface.data.source import open_source
from lrface.errors import LrfaceError, UsageError
from lrface.overlap import _by_embedding, _PairTable, calibrate, find_overlap, normalised_name


def face(person, number, noise=0.6):
    """A picture, uint8 [112, 112, 3]: a coarse pattern for the person and a weaker one for the image."""
    base = np.random.default_rng(person).uniform(-0.5, 0.5, (7, 7, 3))
    own = np.random.default_rng((person, number)).uniform(-0.5, 0.5, (7, 7, 3))
    grid = (0.5 + 0.5 * (base + noise * own)).astype(np.float32)
    return (np.clip(cv2.resize(grid, (112, 112), interpolation=cv2.INTER_NEAREST), 0, 1) * 255).astype(
        np.uint8
    )


def jpeg(image, quality=95):
    return cv2.imencode(".jpg", image[:, :, ::-1], (cv2.IMWRITE_JPEG_QUALITY, quality))[1].tobytes()


def png(data):
    return cv2.imencode(".png", cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))[1].tobytes()


def write_people(root, people):
    """{identity: [encoded images]} as a folder of identity folders."""
    for name, images in people.items():
        (root / name).mkdir(parents=True)
        for number, data in enumerate(images):
            suffix = "png" if data.startswith(b"\x89PNG") else "jpg"
            (root / name / f"{number}.{suffix}").write_bytes(data)
    return root


def several(person, numbers):
    return [jpeg(face(person, number)) for number in numbers]


@pytest.fixture(scope="module")
def planted(tmp_path_factory, pooled_model):
    root = tmp_path_factory.mktemp("planted")
    file, pixels, photograph = (jpeg(face(person, 0)) for person in (20, 30, 40))
    train = {
        "007": several(7, range(3)),
        "Zoë_Kravitz": several(10, range(3)),
        "file": [file, *several(20, (1, 2))],
        "pixels": [pixels, *several(30, (1, 2))],
        "photograph": [photograph, *several(40, (1, 2))],
        "person": several(50, range(4)),
        # One image of a person of the benchmark under a wrong name is not the person.
        "stray": [*several(60, range(3)), jpeg(face(71, 9))],
        "nobody": several(80, range(3)),
    }
    test = {
        "007": several(8, range(3)),
        "zoe kravitz": several(11, range(3)),
        "has file": [*several(21, range(2)), file],
        "has pixels": [*several(31, range(2)), png(pixels)],
        "has photograph": [*several(41, range(2)), jpeg(face(40, 0), 70)],
        "is person": several(50, range(10, 13)),
        "is stray": several(71, range(3)),
        **{f"other {number}": several(100 + number, range(2)) for number in range(12)},
    }
    return (
        write_people(root / "train", train),
        write_people(root / "test", test),
        pooled_model,
    )


EXPECTED = {
    ("name", "Zoë_Kravitz", "zoe kravitz", "", ""),
    ("same file", "file", "has file", "file/0.jpg", "has file/2.jpg"),
    ("same pixels", "pixels", "has pixels", "pixels/0.jpg", "has pixels/2.png"),
}
BY_EMBEDDING = {
    ("same photograph", "file", "has file", "file/0.jpg", "has file/2.jpg"),
    ("same photograph", "pixels", "has pixels", "pixels/0.jpg", "has pixels/2.png"),
    ("same photograph", "photograph", "has photograph", "photograph/0.jpg", "has photograph/2.jpg"),
}
LEAKING = ["Zoë_Kravitz", "file", "person", "photograph", "pixels"]


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def evidence(path):
    keys = ("reason", "train_identity", "test_identity", "train_source", "test_source")
    return {tuple(row[key] for key in keys) for row in rows_of(path)}


def test_without_a_model_names_and_contents_are_compared(planted, tmp_path):
    train, test, _ = planted
    found = find_overlap(open_images(train), open_images(test), workers=1, show_progress=False)
    found.write_leaks(tmp_path / "leaks.csv")
    assert evidence(tmp_path / "leaks.csv") == EXPECTED
    assert found.to_dict()["drop"] == ["Zoë_Kravitz", "file", "pixels"]
    assert found.threshold is None
    assert "not compared, no --model" in str(found)


@pytest.mark.parametrize("threshold", [0.5, None])
def test_every_planted_leak_is_found_and_nothing_else(planted, tmp_path, threshold):
    train, test, model = planted
    found = find_overlap(
        open_images(train),
        open_images(test),
        load_embedder(model),
        threshold=threshold,
        workers=1,
        device="cpu",
        show_progress=False,
    )
    found.write_leaks(tmp_path / "leaks.csv")
    rows = rows_of(tmp_path / "leaks.csv")
    of_people = [row for row in rows if row["reason"] == "same person"]
    assert evidence(tmp_path / "leaks.csv") - EXPECTED - BY_EMBEDDING == {
        ("same person", "person", "is person", of_people[0]["train_source"], of_people[0]["test_source"])
    }
    assert EXPECTED | BY_EMBEDDING <= evidence(tmp_path / "leaks.csv")
    assert found.to_dict()["drop"] == sorted(LEAKING)
    # The pair named as the best is the best, and the share that agrees is that of all pairs.
    cosines = np.array([[cosine(face(50, a), face(50, b)) for b in range(10, 13)] for a in range(4)])
    best = np.unravel_index(cosines.argmax(), cosines.shape)
    assert of_people[0]["train_source"] == f"person/{best[0]}.jpg"
    assert of_people[0]["test_source"] == f"is person/{best[1]}.jpg"
    assert float(of_people[0]["cosine"]) == pytest.approx(cosines.max(), abs=0.01)
    assert float(of_people[0]["agreeing"]) == pytest.approx((cosines >= found.threshold).mean(), abs=1e-3)
    # The surest come first: equal contents before equal names before likeness.
    assert rows[0]["reason"] in ("same file", "same pixels")
    assert found.threshold == (threshold or pytest.approx(0.4, abs=0.1))
    assert "5  training identities in all" in str(found)


def cosine(one, other):
    a, b = (
        image.reshape(7, 16, 7, 16, 3).mean(axis=(1, 3)).reshape(-1) / 255 - 0.5 for image in (one, other)
    )
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_sheet_shows_train_left_and_test_right(planted, tmp_path):
    train, test, _ = planted
    found = find_overlap(open_images(train), open_images(test), workers=1, show_progress=False)
    found.draw(tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    left, top = MARGIN + LABEL_WIDTH, MARGIN + 58 + 24
    right = left + 3 * (TILE + GAP) + 3 * GAP
    copy = open_source(train).image(open_source(train).sources().index("file/0.jpg"))
    np.testing.assert_array_equal(sheet[top : top + TILE, left : left + TILE], copy)
    np.testing.assert_array_equal(sheet[top : top + TILE, right : right + TILE], copy)


@pytest.mark.parametrize(
    "name, normalised",
    [
        ("Zoë_Kravitz", "zoekravitz"),
        ("  zoe kravitz ", "zoekravitz"),
        ("ZOE-KRAVITZ", "zoekravitz"),
        ("Straße", "strasse"),
        ("n000012", "n000012"),
        ("007", ""),
        ("12_34", ""),
        ("王菲", "王菲"),
    ],
)
def test_names_are_compared_without_what_does_not_matter(name, normalised):
    assert normalised_name(name) == normalised


def test_packs_have_no_names_and_strangers_only_where_they_say_so(planted, tmp_path):
    train, _, model = planted
    random = np.random.default_rng(0)
    images, same = [], []
    for pair in range(220):
        one, other = (50, 50) if pair == 0 else random.choice(200, 2, replace=False) + 200
        if pair and pair % 2:
            other = one
        images += [jpeg(face(int(one), 20 + pair)), jpeg(face(int(other), 400 + pair))]
        same.append(bool(one == other))
    path = tmp_path / "test.bin"
    path.write_bytes(pickle.dumps((images, same), protocol=2))
    found = find_overlap(
        open_images(train),
        open_images(path),
        load_embedder(model),
        workers=1,
        device="cpu",
        show_progress=False,
    )
    assert found.to_dict()["drop"] == ["person"]
    assert not found.names_compared
    assert "by mean and deviation of 109 pairs" in found.threshold_from
    found.write_drop_list(tmp_path / "drop.csv")
    assert [
        (row["identity"], row["images"], row["test_identities"]) for row in rows_of(tmp_path / "drop.csv")
    ] == [("person", "4", "")]


class Labelled:
    """As much of a benchmark as calibration looks at."""

    name, different = "test", None

    def __init__(self, labels):
        self.source = self
        self.labels = labels


def test_the_threshold_is_what_the_rate_says():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(400, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = np.repeat(np.arange(100), 4)
    scores = (vectors @ vectors.T)[np.triu_indices(400, 1)]
    strangers = scores[(labels[:, None] != labels[None])[np.triu_indices(400, 1)]]
    threshold, text = calibrate(Labelled(labels), vectors, 1e-3)
    assert (strangers >= threshold).sum() == int(1e-3 * len(strangers))
    assert "79,200 pairs" in text
    # Of so few pairs none can be expected at 1e-5: by the normal distribution.
    threshold, text = calibrate(Labelled(labels), vectors, 1e-5)
    assert threshold == pytest.approx(
        statistics.NormalDist(strangers.mean(), strangers.std()).inv_cdf(1 - 1e-5), abs=1e-4
    )
    assert "mean and deviation" in text
    with pytest.raises(UsageError, match="give --threshold"):
        calibrate(Labelled(np.zeros(400, int)), vectors, 1e-3)


def test_pairs_of_identities_in_blocks_are_those_of_the_whole_matrix(monkeypatch):
    random = np.random.default_rng(1)
    labels, others = np.sort(random.integers(0, 20, 300)), random.integers(0, 30, 200)
    centres = random.normal(size=(30, 24))
    train = centres[labels] + random.normal(size=(300, 24))
    test = centres[others] + random.normal(size=(200, 24))
    train, test = (
        (side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float32) for side in (train, test)
    )
    train[5] = test[7] = 0  # could not be decoded
    cosines = train @ test.T
    for rows in (300, 17):
        monkeypatch.setattr("lrface.overlap.BLOCK_NUMBERS", rows * len(test))
        leaks = _by_embedding(train, labels, test, others, 0.4, 0.75, "cpu", False)
        people = {(leak.train_label, leak.test_label): leak for leak in leaks if leak.reason == "same person"}
        expected = {}
        for label in range(20):
            for other in range(30):
                own = (labels == label) & train.any(axis=1)
                block = cosines[np.ix_(own, (others == other) & test.any(axis=1))]
                if block.size and (block >= 0.4).mean() >= 0.5:
                    expected[label, other] = (block >= 0.4).mean(), block.max()
        assert set(people) == set(expected)
        for pair, leak in people.items():
            assert (leak.agreeing, leak.cosine) == pytest.approx(expected[pair], abs=1e-5)
            assert cosines[leak.train_index, leak.test_index] == pytest.approx(leak.cosine, abs=1e-5)
        photographs = {leak.test_index: leak for leak in leaks if leak.reason == "same photograph"}
        assert set(photographs) == set(np.flatnonzero(cosines.max(axis=0) >= 0.75).tolist())
        assert all(leak.train_index == cosines[:, column].argmax() for column, leak in photographs.items())
        assert len(expected) > 5 and len(photographs) > 5


def test_a_threshold_that_everything_reaches_is_refused(monkeypatch):
    monkeypatch.setattr("lrface.overlap.MAXIMUM_CANDIDATES", 10)
    table = _PairTable(0.1)
    keys = np.arange(11)
    with pytest.raises(LrfaceError, match="higher --threshold"):
        table.add(keys, np.ones(11, np.float32), keys, keys)


@pytest.mark.parametrize("settings", [{"threshold": 2}, {"same_photograph": -3}, {"false_accept_rate": 0}])
def test_values_out_of_range_are_refused(planted, settings):
    train, test, _ = planted
    with pytest.raises(UsageError):
        find_overlap(open_images(train), open_images(test), **settings)


def test_from_the_command_line_to_a_clean_training_set(planted, tmp_path):
    train, test, model = planted
    arguments = ["data", "overlap", str(train), str(test), "--model", str(model), "--workers", "1"]
    files = {name: tmp_path / name for name in ("drop.csv", "leaks.csv", "sheet.png")}
    options = ["--out", files["drop.csv"], "--report", files["leaks.csv"], "--sheet", files["sheet.png"]]
    result = CliRunner().invoke(app, [*arguments, *map(str, options), "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["drop"] == sorted(LEAKING)
    assert found["identities"] == {
        "name": 1,
        "same file": 1,
        "same pixels": 1,
        "same photograph": 3,
        "same person": 1,
    }
    assert all(path.stat().st_size for path in files.values())
    parts = tmp_path / "clean", tmp_path / "held"
    result = CliRunner().invoke(
        app,
        [
            "data",
            "split",
            str(train),
            *map(str, parts),
            "--held-out",
            "0.99",
            "--drop",
            str(files["drop.csv"]),
        ],
    )
    assert result.exit_code == 2
    (tmp_path / "more").mkdir()
    write_people(tmp_path / "more" / "train", {f"p{n}": several(300 + n, range(2)) for n in range(3)})
    for folder in train.iterdir():
        (tmp_path / "more" / "train" / folder.name).symlink_to(folder)
    result = CliRunner().invoke(
        app,
        [
            "data",
            "split",
            str(tmp_path / "more" / "train"),
            *map(str, parts),
            "--held-out",
            "2",
            "--drop",
            str(files["drop.csv"]),
        ],
    )
    assert result.exit_code == 0, result.output
    names = [set(open_source(part).identities) for part in parts]
    assert names[0] | names[1] == {"007", "stray", "nobody", "p0", "p1", "p2"}
    assert len(names[1]) == 2 and not names[0] & names[1]
    # What is left to train on has nothing in common with the benchmark.
    again = find_overlap(
        open_images(parts[0]),
        open_images(test),
        load_embedder(model),
        threshold=0.5,
        workers=1,
        device="cpu",
        show_progress=False,
    )
    assert again.leaks == []
