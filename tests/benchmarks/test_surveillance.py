"""QMUL-SurvFace, XQLFW, IJB-B and IJB-C: miniatures in the official layouts, evaluated end to end."""

import json

import cv2
import numpy as np
import pytest
import scipy.io
from typer.testing import CliRunner

from lrface.benchmarks.faces import FileFaces
from lrface.benchmarks.ijb import accept_rates, pair_scores, pool_media, read_ijb
from lrface.benchmarks.metrics import true_accept_rate
from lrface.benchmarks.survface import load_survface_pairs, read_survface
from lrface.benchmarks.verification import load_benchmark
from lrface.cli import app
from lrface.data.synthetic import SyntheticFaces
from lrface.embed import load_embedder
from lrface.errors import LrfaceError, UsageError
from lrface.evaluation import verify_models
from lrface.identification_run import run_identification, verify_templates

PEOPLE = SyntheticFaces(8, 6)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LRFACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LRFACE_DATA", raising=False)


def write(path, image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])


def names_array(rows) -> np.ndarray:
    array = np.empty((len(rows), len(rows[0])), dtype=object)
    for row, names in enumerate(rows):
        array[row] = names
    return array


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def fused_features(model, images):
    import torch

    tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255.0
    embed = load_embedder(str(model)).embed_tensor
    return (embed(tensor) + embed(torch.flip(tensor, dims=(3,)))).numpy().astype(np.float64)


# QMUL-SurvFace


def tiny(person, number):
    rng = np.random.default_rng(100 * person + number)
    image = cv2.resize(
        PEOPLE.image(6 * person + number), (int(rng.integers(14, 26)), int(rng.integers(16, 30)))
    )
    return np.clip(image + rng.normal(0, 15, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def survface(tmp_path):
    root = tmp_path / "data/QMUL-SurvFace"
    test = root / "Face_Identification_Test_Set"
    lists = {"gallery": ([], []), "mated_probe": ([], [])}
    for person in range(5):
        for number in range(4):
            part = "gallery" if number < 2 else "mated_probe"
            name = f"{person + 1}_cam{number}_1.png"
            write(test / part / name, tiny(person, number))
            lists[part][0].append([name])
            lists[part][1].append(person + 1)
    for person in range(5, 8):
        for number in range(4):
            write(test / f"unmated_probe/{person + 1}_cam{number}_1.png", tiny(person, number))
    for part, (names, ids) in lists.items():
        ids_column = np.array(ids, dtype=np.uint16)[:, None]
        content = {f"{part}_set": names_array(names), f"{part}_ids": ids_column}
        scipy.io.savemat(test / f"{part}_img_ID_pairs.mat", content)
    verification = root / "Face_Verification_Test_Set"
    positive = [[f"{p}_cam0_1.png", f"{p}_cam1_1.png"] for p in range(8)]
    negative = [[f"{p}_cam0_1.png", f"{(p + 3) % 8}_cam1_1.png"] for p in range(8)]
    for person in range(8):
        for number in range(2):
            write(verification / f"verification_images/{person}_cam{number}_1.png", tiny(person, number))
    for kind, pairs in (("positive", positive), ("negative", negative)):
        variable = f"{kind}_pairs_names"
        scipy.io.savemat(verification / f"{variable}.mat", {variable: names_array(pairs)})
    return root


def enlarged(path):
    return cv2.resize(cv2.imread(str(path)), (112, 112), interpolation=cv2.INTER_LINEAR)[..., ::-1]


def test_survface_open_set_by_templates(survface, pooled_model):
    (row,) = run_identification([str(pooled_model)], "survface", data=survface, show_progress=False).rows
    assert (row["gallery"], row["gallery_images"], row["mated"], row["unmated"]) == (5, 10, 10, 12)
    assert row["protocol"] == "QMUL-SurvFace" and row["open_rank"] == 20 and row["pooling"] == "mean"
    assert row["unaligned"] == 32  # nothing is aligned, and that is said
    found = read_survface(survface / "Face_Identification_Test_Set")
    root = found.images
    gallery = unit(fused_features(pooled_model, [enlarged(root / path) for path in found.gallery_paths]))
    probes = unit(fused_features(pooled_model, [enlarged(root / path) for path in found.probe_paths]))
    people = np.arange(1, 6)
    templates = unit(np.stack([gallery[found.gallery_ids == person].mean(axis=0) for person in people]))
    scores = probes @ templates.T
    mated = found.probe_ids > 0
    own = scores[mated, found.probe_ids[mated] - 1]
    assert row["rank"]["1"] == pytest.approx(100 * np.mean(own >= scores[mated].max(axis=1)), abs=1e-3)
    strangers = np.sort(scores[~mated].max(axis=1))[::-1]
    for rate in (0.1, 0.2, 0.3):
        expected = np.mean(own > strangers[int(np.floor(rate * 12 + 1e-9))])
        assert row["tpir_at_fpir"][f"{rate:g}"] == pytest.approx(100 * expected, abs=1e-3)
    (images,) = run_identification(
        [str(pooled_model)], "survface", data=survface, pooling="none", show_progress=False
    ).rows
    assert images["gallery"] == 10 and images["pooling"] is None
    run = CliRunner().invoke(
        app, ["identify", "--benchmark", "survface", "--data", str(survface), "--model", str(pooled_model)]
    )
    assert run.exit_code == 0 and "a hit is a mate among the 20 best" in run.stdout
    assert "not the official set: gallery: 10 images, 60,294 in the official set" in run.stdout


def test_survface_lists_may_lie_in_the_evaluation_folder(survface):
    test = survface / "Face_Identification_Test_Set"
    before = read_survface(test)
    (survface / "Face_Identification_Evaluation").mkdir()
    for name in ("gallery_img_ID_pairs.mat", "mated_probe_img_ID_pairs.mat"):
        (test / name).rename(survface / "Face_Identification_Evaluation" / name)
    after = read_survface(test)
    assert (
        after.gallery_paths == before.gallery_paths and after.probe_ids.tolist() == before.probe_ids.tolist()
    )
    (test / "gallery/1_cam0_1.png").unlink()
    with pytest.raises(LrfaceError, match="1 images that it names are not in .*gallery, the first: 1_cam0_1"):
        read_survface(test)


def test_survface_pairs(survface, pooled_model):
    found = load_survface_pairs(survface / "Face_Verification_Test_Set", show_progress=False)
    assert len(found) == 16 and found.same.tolist() == [True] * 8 + [False] * 8 and found.unaligned == 16
    folder = survface / "Face_Verification_Test_Set/verification_images"
    for pair, (left, right) in ((0, ("0_cam0_1", "0_cam1_1")), (9, ("1_cam0_1", "4_cam1_1"))):
        assert np.array_equal(found.images[found.left[pair]], enlarged(folder / f"{left}.png"))
        assert np.array_equal(found.images[found.right[pair]], enlarged(folder / f"{right}.png"))
    run = verify_models([str(pooled_model)], ["survface"], (112,), data=survface.parent, show_progress=False)
    assert run.rows[0]["benchmark"] == "survface" and run.rows[0]["pairs"] == 16
    native = verify_models(
        [str(pooled_model)], ["survface"], (), data=survface.parent, native=True, show_progress=False
    )
    (row,) = native.rows
    assert row["accuracy"] == run.rows[0]["accuracy"]
    assert sum(part["pairs"] for part in row["by_native_size"]) == 16
    assert all(part["largest"] <= 48 for part in row["by_native_size"])
    named = load_benchmark(survface / "Face_Verification_Test_Set", show_progress=False)
    assert np.array_equal(named.left, found.left)
    scipy.io.savemat(
        survface / "Face_Verification_Test_Set/negative_pairs_names.mat",
        {"negative_pairs_names": names_array([["0_cam0_1.png", "99.png"]])},
    )
    with pytest.raises(LrfaceError, match="1 images that it names are not in .*99.png"):
        load_survface_pairs(survface / "Face_Verification_Test_Set")
    scipy.io.savemat(
        survface / "Face_Verification_Test_Set/negative_pairs_names.mat",
        {"negative_pairs_names": names_array([["0_cam0_1.png"]])},
    )
    with pytest.raises(LrfaceError, match="two names a row is expected, found shape"):
        load_survface_pairs(survface / "Face_Verification_Test_Set")


# XQLFW


@pytest.mark.parametrize("images", ["xqlfw_aligned_112", "xqlfw_aligned_112/xqlfw_aligned_112"])
def test_xqlfw_as_it_unpacks(tmp_path, pooled_model, images):
    root = tmp_path / "data/xqlfw"
    for person in range(4):
        for number in range(2):
            write(
                root / images / f"P_{person}/P_{person}_{number + 1:04d}.jpg",
                PEOPLE.image(6 * person + number),
            )
    lines = ["2\t2"]
    for fold in range(2):
        lines += [f"P_{2 * fold + k}\t1\t2" for k in range(2)]
        lines += [f"P_{2 * fold}\t{k + 1}\tP_{2 * fold + 1}\t{k + 1}" for k in range(2)]
    (root / "xqlfw_pairs.txt").write_text("\n".join(lines) + "\n")
    arguments = [
        "verify",
        "--model",
        str(pooled_model),
        "--benchmark",
        "XQLFW",
        "--resolutions",
        "112",
        "--json",
    ]
    run = CliRunner().invoke(app, [*arguments, "--data", str(tmp_path / "data")])
    assert run.exit_code == 0, run.stderr
    (row,) = json.loads(run.stdout)["results"]
    assert (row["benchmark"], row["pairs"], row["images"], row["folds"]) == ("xqlfw", 8, 8, 2)
    run = CliRunner().invoke(app, [*arguments, "--data", str(tmp_path)])
    assert run.exit_code == 1 and "Get Cross-Quality LFW from its authors" in run.stderr
    assert "xqlfw_pairs.txt" in run.stderr and "out of" not in run.stderr


# IJB


def write_ijb(folder, name):
    """8 subjects; templates 1 to 8 in the two galleries, 11 to 18 the probes. Template 11 has two photographs and a
    video of three frames, 12 only a video; loose crops are larger than the face and shifted."""
    meta, crops = folder / "meta", folder / "loose_crop"
    meta.mkdir(parents=True)
    from lrface.align.warp import TEMPLATE_112

    faces, points, pooled = [], [], []
    rng = np.random.default_rng(0)
    media = 500

    def add(template, person, number, media_number):
        photo = np.full((160, 150, 3), 90, np.uint8)
        shift = rng.integers(5, 30, 2)
        photo[shift[1] : shift[1] + 112, shift[0] : shift[0] + 112] = PEOPLE.image(6 * person + number)
        image = f"{len(faces) + 1}.png"
        write(crops / image, photo)
        landmarks = (TEMPLATE_112 + shift).flatten()
        score = round(float(rng.uniform(0.5, 1)), 3)
        faces.append(f"{image} {template} {media_number}")
        points.append(f"{image} {' '.join(f'{value:.4f}' for value in landmarks)} {score}")
        pooled.append((template, media_number, PEOPLE.image(6 * person + number), score))

    for person in range(8):
        add(person + 1, person, 0, media := media + 1)
        for number in range(1, 1 + (1 if person % 2 else 3)):
            if number == 1 or person != 0:
                media += 1
            add(person + 11, person, 2 if number == 1 else 2 + number, media)
    (meta / f"{name}_face_tid_mid.txt").write_text("\n".join(faces) + "\n")
    (meta / f"{name}_name_5pts_score.txt").write_text("\n".join(points) + "\n")
    pairs = [(left, right, int(left == right - 10)) for left in range(1, 9) for right in range(11, 19)]
    lines = "".join(f"{left} {right} {label}\n" for left, right, label in pairs)
    (meta / f"{name}_template_pair_label.txt").write_text(lines)
    galleries = ("S1", "S2") if name == "ijbb" else ("G1", "G2")
    header = "TEMPLATE_ID,SUBJECT_ID,FILENAME,FACE_X"
    for part, people, offset in (
        (f"gallery_{galleries[0]}", range(0, 4), 1),
        (f"gallery_{galleries[1]}", range(4, 8), 1),
        ("probe_mixed", range(8), 11),
    ):
        rows = [f"{p + offset},{1000 + p},img/{p}.jpg,3" for p in people for _ in range(2)]
        (meta / f"{name}_1N_{part}.csv").write_text("\n".join([header, *rows]) + "\n")
    return pooled, pairs


def slow_templates(features, entries, keep_length, by_score):
    """Templates by the letter: means within media, their sum, unit length."""
    found = {}
    for template in sorted({entry[0] for entry in entries}):
        by_media = {}
        for vector, (number, media, _, score) in zip(features, entries, strict=True):
            if number == template:
                vector = vector if keep_length else unit(vector)
                by_media.setdefault(media, []).append(vector * (score if by_score else 1.0))
        found[template] = unit(np.sum([np.mean(group, axis=0) for group in by_media.values()], axis=0))
    return found


@pytest.mark.parametrize("name", ["ijbb", "ijbc"])
def test_templates_of_ijb(tmp_path, pooled_model, name):
    entries, pairs = write_ijb(tmp_path / name.upper(), name)
    run = verify_templates([str(pooled_model)], name, data=tmp_path, show_progress=False)
    features = fused_features(pooled_model, [entry[2] for entry in entries])
    same = np.array([label == 1 for *_, label in pairs])
    assert [row["weighting"] for row in run.rows][0].endswith("(InsightFace N1D1F1)") and len(run.rows) == 4
    for row, (keep, by_score) in zip(run.rows, ((1, 1), (1, 0), (0, 1), (0, 0)), strict=True):
        templates = slow_templates(features, entries, keep, by_score)
        scores = [templates[left] @ templates[right] for left, right, _ in pairs]
        assert row["tar_at_far"]["1e-1"] == pytest.approx(100 * true_accept_rate(scores, same, 0.1), abs=1e-3)
        assert row["tar_at_far"]["1e-6"] is None
        assert (row["pairs"], row["same"], row["templates"], row["images"]) == (64, 8, 16, len(entries))
    assert row["media"] < len(entries) and row["unaligned"] == 0
    assert "images, " in run.notes[0] and "in the official set" in run.notes[0]

    found = run_identification([str(pooled_model)], name.upper(), data=tmp_path, show_progress=False)
    first, second, mean, joined = found.rows
    templates = slow_templates(features, entries, True, True)
    probes = np.stack([templates[p + 11] for p in range(8)])
    for row, people in ((first, range(4)), (second, range(4, 8)), (joined, range(8))):
        scores = probes @ np.stack([templates[p + 1] for p in people]).T
        own = [scores[p, p - people[0]] for p in people]
        hits = np.mean([scores[p].max() == value for p, value in zip(people, own, strict=True)])
        assert row["rank"]["1"] == pytest.approx(100 * hits, abs=1e-3) and row["mated"] == len(people)
        if len(people) < 8:
            strangers = np.sort([scores[p].max() for p in range(8) if p not in people])[::-1]
            right = [
                value == scores[p].max() and value > strangers[1]
                for p, value in zip(people, own, strict=True)
            ]
            assert row["tpir_at_fpir"]["0.3"] == pytest.approx(100 * np.mean(right), abs=1e-3)
    assert mean["rank"]["1"] == pytest.approx((first["rank"]["1"] + second["rank"]["1"]) / 2, abs=1e-3)
    assert mean["tpir_at_fpir"]["0.01"] is None and joined["fnir_at_fpir"] is None

    if name == "ijbb":
        return
    page = tmp_path / "page.html"
    for command in ("verify", "identify"):
        arguments = [command, "--model", str(pooled_model), "--benchmark", name, "--data", str(tmp_path)]
        result = CliRunner().invoke(app, [*arguments, "--report", str(page)])
        assert result.exit_code == 0, result.output
        assert "not the official set" in result.stdout and "<svg" in page.read_text()
        printed = [CliRunner().invoke(app, [*arguments, "--json"]).stdout for _ in range(2)]
        assert printed[0] == printed[1] and json.loads(printed[0])["results"]


def test_faces_are_aligned_by_the_points_given(tmp_path):
    entries, _ = write_ijb(tmp_path / "IJBC", "ijbc")
    found = read_ijb(tmp_path / "IJBC", "ijbc")
    faces = found.faces()
    assert isinstance(faces, FileFaces)
    crops = faces.read(0, len(faces)).astype(int)
    difference = np.abs(crops - np.stack([entry[2] for entry in entries]).astype(int))
    assert difference[:, 2:-2, 2:-2].mean() < 0.5
    points = tmp_path / "IJBC/meta/ijbc_name_5pts_score.txt"
    lines = points.read_text().splitlines()
    lines[2] = f"3.png {'50 ' * 10}0.7"  # all points coincide
    points.write_text("\n".join(lines) + "\n")
    faces = read_ijb(tmp_path / "IJBC", "ijbc").faces()
    assert faces.aligned.tolist().count(False) == 1 and not faces.aligned[2]
    assert faces.read(2, 3).shape == (1, 112, 112, 3)


def test_pooling_of_many_faces_and_pairs_in_chunks():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(300, 24)).astype(np.float32)
    templates, media = rng.integers(0, 20, 300), rng.integers(0, 5, 300)
    weights = rng.uniform(0.1, 1, 300)
    entries = [(int(t), int(m), None, float(w)) for t, m, w in zip(templates, media, weights, strict=True)]
    pooled, numbers = pool_media(features, templates, media, False, weights)
    expected = slow_templates(features.astype(np.float64), entries, False, True)
    assert numbers.tolist() == sorted(expected)
    assert np.allclose(pooled, np.stack([expected[number] for number in numbers]), atol=1e-6)
    left, right = rng.integers(0, len(pooled), (2, 5000))
    scores = pair_scores(pooled, left, right)
    assert all(np.array_equal(scores, pair_scores(pooled, left, right, chunk)) for chunk in (7, 1000))
    same = rng.random(5000) < 0.1
    for rate, found in accept_rates(scores, same).items():
        assert found == true_accept_rate(scores, same, float(rate))
    with pytest.raises(LrfaceError, match="template 3: its faces add up to zero"):
        pool_media(np.array([[1, 0], [-1, 0]], np.float32), np.array([3, 3]), np.array([1, 2]))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "ijbc_face_tid_mid.txt",
            lambda text: text.replace("2.png", "other.png", 1),
            "line 2: it should name the same",
        ),
        ("ijbc_face_tid_mid.txt", lambda text: text.replace("1.png 1 501", "1.png one 501"), "one"),
        ("ijbc_face_tid_mid.txt", lambda text: "", "3 fields are expected, found 1"),
        (
            "ijbc_name_5pts_score.txt",
            lambda text: text.replace("1.png", "1.png 7", 1),
            "12 fields are expected, found 13",
        ),
        ("ijbc_template_pair_label.txt", lambda text: text + "1 11 5\n", "line 65: the label is 5"),
        (
            "ijbc_template_pair_label.txt",
            lambda text: text + "1 99 0\n",
            "templates have no images, the first: 99",
        ),
        ("ijbc_1N_gallery_G1.csv", lambda text: text + "1,7,x,3\n", "template 1 has two subjects"),
        ("ijbc_1N_probe_mixed.csv", lambda text: "TEMPLATE_ID,SUBJECT_ID\n", "probe_mixed"),
    ],
)
def test_damaged_lists_are_named(tmp_path, pooled_model, file, change, message):
    write_ijb(tmp_path, "ijbc")
    path = tmp_path / "meta" / file
    path.write_text(change(path.read_text()))
    command = "identify" if "1N" in file else "verify"
    arguments = [command, "--model", str(pooled_model), "--benchmark", "ijbc", "--data", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and result.stdout == "" and message in result.stderr, result.stderr


def test_missing_images_and_other_benchmarks_beside(tmp_path, pooled_model):
    write_ijb(tmp_path, "ijbc")
    (tmp_path / "loose_crop/4.png").unlink()
    with pytest.raises(LrfaceError, match="1 images that it names are not in .*loose_crop, the first: 4.png"):
        verify_templates([str(pooled_model)], "ijbc", data=tmp_path)
    with pytest.raises(LrfaceError, match="IJBB was not found"):
        verify_templates([str(pooled_model)], "ijbb", data=tmp_path)
    with pytest.raises(UsageError, match="templates are pooled as its protocol says"):
        run_identification([str(pooled_model)], "ijbc", resolutions=(28,))
    arguments = ["verify", "--model", str(pooled_model), "--benchmark", "lfw", "--benchmark", "ijbc"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "templates are verified by themselves" in result.stderr
