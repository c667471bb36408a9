"""`lrface identify` and template verification end to end, on miniatures in the official layouts."""

import json
import re

import cv2
import numpy as np
import pytest
import scipy.io
import torch
from typer.testing import CliRunner

import lrface.identification_run as runs
from lrface.benchmarks.conditions import Condition
from lrface.benchmarks.faces import FileFaces, as_crop, face_features
from lrface.benchmarks.packs import write_pack
from lrface.cli import app
from lrface.data.synthetic import SyntheticFaces, verification_pairs
from lrface.embed import load_embedder
from lrface.errors import LrfaceError, UsageError
from lrface.identification_run import (
    ADAFACE,
    TINYFACE_AUTHORS,
    folders_set,
    identify_models,
    run_identification,
    tinyface_set,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LRFACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LRFACE_DATA", raising=False)


def cells(names) -> np.ndarray:
    array = np.empty((len(names), 1), dtype=object)
    array[:, 0] = names
    return array


def write(path, image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])


def noisy(image, seed, strength=40):
    noise = np.random.default_rng(seed).normal(0, strength, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def tinyface(tmp_path_factory):
    """12 people with 2 gallery images, 1 or 2 probes, 30 distractors of whom some are copies: ties."""
    root = tmp_path_factory.mktemp("data")
    testing = root / "tinyface" / "Testing_Set"
    people, strangers = SyntheticFaces(12, 4), SyntheticFaces(24, 1, first_identity=100)
    gallery, probes = {}, {}
    for person in range(12):
        for number in range(2):
            gallery[f"{person + 5}_{number}.png"] = person + 5
            write(testing / f"Gallery_Match/{person + 5}_{number}.png", people.image(4 * person + number))
        for number in (2, 3)[: 1 + person % 2]:
            probes[f"{person + 5}_{number}.png"] = person + 5
            # like one of the gallery's images, more or less
            share = 0.9 - 0.06 * person
            mixed = share * people.image(4 * person) + (1 - share) * people.image(4 * person + number)
            image = noisy(mixed, person, 60)
            write(testing / f"Probe/{person + 5}_{number}.png", image)
    for number in range(24):
        write(testing / f"Gallery_Distractor/{number:03d}.png", strangers.image(number))
    for number in range(3):  # a probe and two gallery images stand among the distractors too
        name = list(probes)[number]
        image = cv2.imread(str(testing / f"Probe/{name}"))
        for copy in "ab":
            assert cv2.imwrite(str(testing / f"Gallery_Distractor/9{number}{copy}.png"), image)
    for part, entries in (("gallery_match", gallery), ("probe", probes)):
        variable = "gallery" if part == "gallery_match" else part
        ids = np.array(list(entries.values()), dtype=np.uint16)[:, None]
        scipy.io.savemat(
            testing / f"{part}_img_ID_pairs.mat",
            {f"{variable}_set": cells(list(entries)), f"{variable}_ids": ids},
        )
    return root


def brute_force(probe, probe_ids, gallery, gallery_ids, distance, ranks):
    """Rank-k and mean average precision the slow way, a probe at a time, whole numbers as the authors count."""
    hits = dict.fromkeys(ranks, 0)
    precisions = []
    for vector, identity in zip(probe, probe_ids, strict=True):
        order = sorted(range(len(gallery)), key=lambda g: (distance(vector, gallery[g]), g))
        right = [gallery_ids[g] == identity for g in order]
        for k in ranks:
            hits[k] += any(right[:k])
        total, found, area, last_recall, last_precision = sum(right), 0, 0.0, 0.0, 1.0
        for place, mate in enumerate(right, start=1):
            found += mate
            recall, precision = found / total, found / place
            area += (recall - last_recall) * (precision + last_precision) / 2
            last_recall, last_precision = recall, precision
        precisions.append(area)
    return {str(k): 100 * hits[k] / len(probe) for k in ranks}, 100 * float(np.mean(precisions))


def all_features(model, root, names):
    """Raw features of image and mirror image, one image at a time."""
    embedder = load_embedder(str(model))
    plain, mirrored = [], []
    for name in names:
        image = (
            torch.from_numpy(cv2.imread(str(root / name))[..., ::-1].copy()).permute(2, 0, 1)[None] / 255.0
        )
        plain.append(embedder.embed_tensor(image)[0].numpy().astype(np.float64))
        mirrored.append(embedder.embed_tensor(torch.flip(image, dims=(3,)))[0].numpy().astype(np.float64))
    return np.array(plain), np.array(mirrored)


def test_tinyface_as_its_authors_and_as_adaface_score_it(tinyface, pooled_model):
    run = run_identification([str(pooled_model)], "tinyface", data=tinyface, show_progress=False)
    assert [row["protocol"] for row in run.rows] == [TINYFACE_AUTHORS, ADAFACE, "open set"]
    authors, adaface, opened = run.rows
    found = tinyface_set(tinyface, show_progress=False)
    root = tinyface / "tinyface/Testing_Set"
    probes = [f"Probe/{path.name}" for path in sorted((root / "Probe").iterdir(), key=lambda p: p.name)]
    order = {name: index for index, name in enumerate(probes)}
    variables = scipy.io.loadmat(root / "probe_img_ID_pairs.mat")
    listed = [f"Probe/{name[0][0]}" for name in variables["probe_set"]]
    gallery = [
        f"Gallery_Match/{name[0][0]}"
        for name in scipy.io.loadmat(root / "gallery_match_img_ID_pairs.mat")["gallery_set"]
    ]
    gallery += [f"Gallery_Distractor/{path.name}" for path in sorted((root / "Gallery_Distractor").iterdir())]
    assert set(listed) == set(order) and found.gallery_ids.tolist().count(-100) == 30
    plain, mirrored = all_features(pooled_model, root, listed + gallery)
    count = len(listed)
    ranks = (1, 5, 10, 20, 50)
    expected = brute_force(
        plain[:count],
        found.probe_ids,
        plain[count:],
        found.gallery_ids,
        lambda a, b: np.linalg.norm(a - b),
        ranks,
    )
    assert authors["rank"] == pytest.approx(expected[0], abs=1e-3)
    assert authors["mean_average_precision"] == pytest.approx(expected[1], abs=1e-3)
    assert 0 < authors["rank"]["1"] < 100 and authors["metric"] == "euclidean" and not authors["flip"]
    fused = plain + mirrored
    fused /= np.linalg.norm(fused, axis=1, keepdims=True)
    expected = brute_force(
        fused[:count], found.probe_ids, fused[count:], found.gallery_ids, lambda a, b: -float(a @ b), ranks
    )
    assert adaface["rank"] == pytest.approx(expected[0], abs=1e-3)
    assert adaface["mean_average_precision"] == pytest.approx(expected[1], abs=1e-3)
    assert (adaface["probes"], adaface["gallery"], adaface["distractors"]) == (count, 54, 30)
    assert adaface["gallery_identities"] == 12 and adaface["unaligned"] == 0 and adaface["probe_size"] is None

    # the open set by hand: half the people leave
    stays = runs.without_identities(found.gallery_ids, 0.5, 0)
    scores = fused[:count] @ fused[count:][stays].T
    ids = found.gallery_ids[stays]
    mated = np.isin(found.probe_ids, ids)
    strangers = scores[~mated].max(axis=1)
    top = scores.argmax(axis=1)
    mates = np.where(ids[top] == found.probe_ids, scores.max(axis=1), -np.inf)[mated]
    threshold = np.sort(strangers)[::-1]
    for rate in (0.2, 0.3):
        allowed = int(np.floor(rate * len(strangers) + 1e-9))
        # the smallest threshold with at most so many strangers is just above the next one
        missed = np.mean(mates <= threshold[allowed])
        assert opened["fnir_at_fpir"][f"{rate:g}"] == pytest.approx(100 * missed, abs=1e-3)
        assert opened["tpir_at_fpir"][f"{rate:g}"] == pytest.approx(100 - 100 * missed, abs=1e-3)
    assert opened["fnir_at_fpir"]["0.001"] is None and opened["rank"] is None
    assert opened["removed_share"] == 0.5 and opened["open_mated"] == mated.sum()


def test_two_runs_give_the_same_json_and_chunks_change_nothing(tinyface, pooled_model, tmp_path):
    benchmark = tinyface_set(tinyface, show_progress=False)
    printed = [
        json.dumps(
            identify_models(
                [str(pooled_model)],
                benchmark,
                (112, 14),
                batch_size=4,
                chunk=chunk,
                show_progress=False,
                **kept,
            ).to_json()
        )
        for chunk, kept in (
            (1024, {"cache": tmp_path}),
            (1024, {"cache": tmp_path}),
            (4, {"keep_features": False}),
            (9, {"keep_features": False}),
        )
    ]
    assert len(set(printed)) == 1
    rows = json.loads(printed[0])["results"]
    assert [row["probe_size"] for row in rows] == [112] * 3 + [14] * 3
    assert rows[3]["rank"] != rows[0]["rank"]
    features = [
        face_features(
            load_embedder(str(pooled_model)).embed_tensor,
            benchmark.gallery,
            Condition(),
            name="gallery",
            batch_size=4,
            chunk=chunk,
        )
        for chunk in (1, 8, 10_000)
    ]
    assert np.array_equal(features[0], features[1]) and np.array_equal(features[0], features[2])


def test_at_most_a_chunk_of_crops_is_read_at_once(tinyface, pooled_model):
    benchmark = tinyface_set(tinyface, show_progress=False)
    asked = []
    faces = benchmark.gallery

    class Watched:
        size, aligned, scores = faces.size, faces.aligned, faces.scores

        def __len__(self):
            return len(faces)

        def read(self, start, stop):
            asked.append(stop - start)
            return faces.read(start, stop)

    embed = load_embedder(str(pooled_model)).embed_tensor
    face_features(embed, Watched(), Condition(), name="gallery", batch_size=4, chunk=8)
    assert max(asked) == 8 and sum(asked) == len(faces)


def test_photographs_are_aligned_once_and_those_without_a_face_counted(tmp_path, pooled_model):
    """Grey walls have no face; a damaged file is a grey crop. All of them stay in the test."""
    for part in ("gallery", "probe"):
        for person in ("anna", "bert"):
            shade = 60 if person == "anna" else 200
            rng = np.random.default_rng(shade + len(part))
            image = np.full((80, 70, 3), shade, np.uint8) + rng.integers(0, 20, (80, 70, 3)).astype(np.uint8)
            write(tmp_path / part / person / "0.png", image)
    (tmp_path / "probe/bert/1.png").write_bytes(b"\x89PNG damaged")
    arguments = {"gallery": tmp_path / "gallery", "probe": tmp_path / "probe", "show_progress": False}
    row = run_identification([str(pooled_model)], workers=1, **arguments).rows[0]
    assert (row["gallery_unaligned"], row["probe_unaligned"], row["unaligned"]) == (2, 3, 5)
    assert row["probes"] == 3 and row["gallery"] == 2
    packed = sorted((tmp_path / "cache/aligned").iterdir())
    before = [(path, path.stat().st_mtime_ns) for path in packed]
    assert run_identification([str(pooled_model)], workers=1, **arguments).rows[0] == row
    assert [
        (path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "cache/aligned").iterdir())
    ] == before


def write_folders(root, pool=False):
    people = SyntheticFaces(6, 6)
    for person in range(6):
        for number in range(6):
            side = "gallery" if number < 3 else "probe"
            occasion = f"{number % 2}/" if side == "probe" else ""
            image = noisy(people.image(6 * person + number), number, 50)
            if (side, person) != ("gallery", 5):  # nobody's mate
                write(root / side / f"p{person}" / f"{occasion}{number}.png", image)


def test_folders_with_templates_and_a_stranger(tmp_path, pooled_model):
    write_folders(tmp_path)
    arguments = {"gallery": tmp_path / "gallery", "probe": tmp_path / "probe", "show_progress": False}
    closed, opened = run_identification([str(pooled_model)], **arguments).rows
    assert (closed["probes"], closed["mated"], closed["unmated"], closed["gallery"]) == (18, 15, 3, 15)
    assert opened["removed_share"] is None and opened["open_unmated"] == 3  # the stranger's own probes
    pooled, _ = run_identification([str(pooled_model)], pooling="mean", **arguments).rows
    assert (pooled["probes"], pooled["mated"], pooled["gallery"], pooled["gallery_images"]) == (12, 10, 5, 15)
    assert pooled["pooling"] == "mean"

    # against templates added up here
    root = tmp_path
    names = {
        side: sorted(str(path.relative_to(root)) for path in (root / side).rglob("*.png"))
        for side in ("gallery", "probe")
    }
    templates = {}
    for side, files in names.items():
        plain, mirrored = all_features(pooled_model, root, files)
        fused = plain + mirrored
        fused /= np.linalg.norm(fused, axis=1, keepdims=True)
        groups = {}
        for name, vector in zip(files, fused, strict=True):
            groups.setdefault(name.rpartition("/")[0], []).append(vector)
        templates[side] = {
            key: np.mean(group, axis=0) / np.linalg.norm(np.mean(group, axis=0))
            for key, group in groups.items()
        }
    gallery = {key.split("/")[1]: vector for key, vector in templates["gallery"].items()}
    hits = [
        max(gallery, key=lambda person: float(vector @ gallery[person])) == key.split("/")[1]
        for key, vector in templates["probe"].items()
        if key.split("/")[1] in gallery
    ]
    assert pooled["rank"]["1"] == pytest.approx(100 * np.mean(hits), abs=1e-3)
    norm, _ = run_identification([str(pooled_model)], pooling="norm", **arguments).rows
    assert norm["pooling"] == "norm"
    with pytest.raises(UsageError, match="--pool quality weighs faces by the detector's score"):
        run_identification([str(pooled_model)], pooling="quality", **arguments)


def test_gallery_and_probe_of_other_people_are_refused(tmp_path, pooled_model):
    write(tmp_path / "a/x/0.png", np.zeros((112, 112, 3), np.uint8))
    write(tmp_path / "b/y/0.png", np.zeros((112, 112, 3), np.uint8))
    with pytest.raises(LrfaceError, match="no identity in common"):
        folders_set(tmp_path / "a", tmp_path / "b", show_progress=False)
    for wrong in ({"benchmark": "tinyface", "gallery": tmp_path}, {}, {"gallery": tmp_path / "a"}):
        with pytest.raises(UsageError, match="--gallery and --probe"):
            run_identification([str(pooled_model)], **wrong)
    with pytest.raises(UsageError, match="identification knows tinyface"):
        run_identification([str(pooled_model)], "lfw")


def test_a_missing_image_nan_and_a_wrong_input_size_give_a_named_error_and_no_table(
    tinyface, pooled_model, tmp_path, monkeypatch
):
    import shutil

    run = CliRunner()
    copy = tmp_path / "data"
    shutil.copytree(tinyface, copy)
    arguments = ["identify", "--benchmark", "tinyface", "--data", str(copy), "--model"]
    whole = run.invoke(app, [*arguments, str(pooled_model)])
    assert whole.exit_code == 0 and "rank-1" in whole.stdout
    (copy / "tinyface/Testing_Set/Probe/5_2.png").unlink()
    result = run.invoke(app, [*arguments, str(pooled_model)])
    assert result.exit_code == 1 and result.stdout == ""
    assert "probe_img_ID_pairs.mat" in result.stderr and "5_2" in result.stderr
    write(copy / "tinyface/Testing_Set/Probe/5_2.png", np.zeros((112, 112, 3), np.uint8))
    (copy / "tinyface/Testing_Set/Gallery_Match/6_0.png").write_bytes(
        (copy / "tinyface/Testing_Set/Gallery_Match/6_0.png").read_bytes()[:60]
    )
    result = run.invoke(app, [*arguments, str(pooled_model)])
    assert result.exit_code == 1 and result.stdout == "" and "6_0.png" in result.stderr

    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def model(name, size, divisor):
        nodes = [
            helper.make_node("AveragePool", ["image"], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("Div", ["flat", "divisor"], ["embedding"]),
        ]
        kind, width = TensorProto.FLOAT, 3 * (size // 16) ** 2
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info("image", kind, ("n", 3, size, size))],
            [helper.make_tensor_value_info("embedding", kind, ("n", width))],
            [numpy_helper.from_array(np.float32(divisor).reshape(1), "divisor")],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(made, tmp_path / f"{name}.onnx")
        return str(tmp_path / f"{name}.onnx")

    arguments[4] = str(tinyface)
    result = run.invoke(app, [*arguments, model("large", 128, 1.0)])
    assert result.exit_code == 2 and result.stdout == ""
    assert "large.onnx takes images of 128x128 pixels, the faces of tinyface have 112x112" in result.stderr
    result = run.invoke(app, [*arguments, model("broken", 112, 0.0)])
    assert result.exit_code == 1 and result.stdout == "" and "not finite" in result.stderr
    result = run.invoke(app, [*arguments, str(pooled_model), "--resolutions", "200"])
    assert result.exit_code == 2 and "200 is not a whole number of pixels between 1 and 112" in result.stderr


def test_the_command_prints_counts_and_writes_a_page(tinyface, pooled_model, tmp_path):
    import re

    arguments = ["identify", "--model", str(pooled_model), "--benchmark", "tinyface", "--data", str(tinyface)]
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, [*arguments, "--resolutions", "112,28", "--report", str(page)])
    assert result.exit_code == 0, result.output
    for text in (
        "TinyFace authors",
        "AdaFace/CVLface",
        "30 of them distractors",
        "50 % of the people left",
        "rank-50",
    ):
        assert text.replace("50 %", "50%") in result.stdout
    assert "not the official set: Gallery_Distractor: 30 images, 153,428 in the official set" in result.stdout
    assert "0 images not aligned" in result.stdout
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>") and text.count("<svg") == 3
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)
    assert (
        "cumulative matches" in text
        and "rank-1 against resolution" in text
        and "Not the official set" in text
    )
    printed = CliRunner().invoke(app, [*arguments, "--json"])
    found = json.loads(printed.stdout)
    assert set(found) == {"results", "deviations"} and len(found["results"]) == 3


def test_crops_of_another_size_among_crops_are_named(tmp_path):
    write(tmp_path / "a.png", np.zeros((112, 112, 3), np.uint8))
    write(tmp_path / "b.png", np.zeros((90, 112, 3), np.uint8))
    with pytest.raises(LrfaceError, match="b.png: is 112x90 pixels among crops"):
        FileFaces(tmp_path, ["a.png", "b.png"], as_crop).read(0, 2)


def test_crops_beside_the_photographs_and_photographs_enlarged_whole(tinyface, pooled_model, tmp_path):
    """AdaFace's authors give out aligned crops in folders named like Testing_Set's, without the lists."""
    photographs = tmp_path / "tinyface/Testing_Set"
    for path in sorted((tinyface / "tinyface/Testing_Set").rglob("*")):
        target = photographs / path.relative_to(tinyface / "tinyface/Testing_Set")
        if path.suffix == ".mat":
            target.write_bytes(path.read_bytes())
        elif path.suffix == ".png":
            image = cv2.resize(cv2.imread(str(path)), (20, 16), interpolation=cv2.INTER_AREA)
            write(target, image[..., ::-1])
    expected = run_identification([str(pooled_model)], "tinyface", data=tinyface, show_progress=False).rows
    models = [str(pooled_model)]
    crops = tinyface / "tinyface/Testing_Set"
    assert (
        run_identification(models, "tinyface", data=tmp_path, crops=crops, show_progress=False).rows
        == expected
    )
    whole = run_identification(models, "tinyface", data=tmp_path, align=False, show_progress=False).rows[0]
    assert whole["unaligned"] == whole["probes"] + whole["gallery"] == 18 + 54
    small = cv2.imread(str(photographs / "Probe/5_2.png"))[..., ::-1]
    benchmark = tinyface_set(tmp_path, align=False, show_progress=False)
    seen = cv2.resize(small, (112, 112), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(benchmark.probe.read(0, 1)[0], seen)
    with pytest.raises(UsageError, match="--crops goes with --benchmark tinyface"):
        run_identification(models, gallery=tmp_path, probe=tmp_path, crops=crops)


def test_faces_weigh_by_the_detectors_score():
    features = np.array([[1, 0], [0, 2], [1, 0], [0, 1]], dtype=np.float32)
    templates, people = np.array([4, 4, 9, 9]), np.array([70, 70, 80, 80])
    scores = np.array([0.9, 0.3, 0.0, 0.0])  # the second template has no face that was detected
    pooled, ids = runs._pooled(features, people, templates, "quality", scores)
    np.testing.assert_allclose(pooled, [np.array([3, 1]) / 10**0.5, np.array([1, 1]) / 2**0.5], atol=1e-6)
    assert ids.tolist() == [70, 80]
    pooled, _ = runs._pooled(features, people, templates, "norm", None)
    np.testing.assert_allclose(pooled[0], np.array([1, 2]) / 5**0.5, atol=1e-6)


def test_several_models_are_rows_of_one_table(tinyface, pooled_model, tmp_path):
    import shutil

    other = tmp_path / "other.onnx"
    shutil.copy(pooled_model, other)
    run = run_identification([str(pooled_model), str(other)], "tinyface", data=tinyface, show_progress=False)
    first, second = run.rows[:3], run.rows[3:]
    assert [row["model"] for row in run.rows] == [str(pooled_model)] * 3 + [str(other)] * 3
    assert [{**row, "model": ""} for row in first] == [{**row, "model": ""} for row in second]
    assert len(run.models) == 2 and "other.onnx" in run.page()


def test_a_suite_reports_identification_alone_and_beside_verification(
    tinyface, pooled_model, tmp_path, monkeypatch
):
    monkeypatch.delenv("LRFACE_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LRFACE_CACHE", str(tmp_path / "cache"))
    model = f"{pooled_model}@colour=RGB"
    command = ["bench", model, "--data", str(tinyface), "--report", str(tmp_path / "page.html")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    alone = (tmp_path / "page.html").read_text()
    assert "Suite paper" in alone and "Table 5" in alone and "Not the official set" in alone
    faces = SyntheticFaces(6, 4)
    left, right, same = verification_pairs(faces, 20)
    files = [
        cv2.imencode(".png", faces.image(int(index))[..., ::-1])[1].tobytes()
        for pair in zip(left, right, strict=True)
        for index in pair
    ]
    write_pack(tmp_path / "drawn.bin", files, same)
    done = CliRunner().invoke(
        app, [*command, "--benchmark", str(tmp_path / "drawn.bin"), "--resolutions", "112,28"]
    )
    assert done.exit_code == 0, done.output
    both = (tmp_path / "page.html").read_text()
    for text in ("Table 5", "drawn: accuracy against resolution", "Not the official set"):
        assert text in both
    identifiers = re.findall(r'\bid="([^"]+)"', both)
    assert len(identifiers) == len(set(identifiers))
