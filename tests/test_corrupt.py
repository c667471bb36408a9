import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lrface.benchmarks.corrupted import corrupt_images
from lrface.benchmarks.image_sets import decode_image, open_images, open_stored, prepare, store_lossy
from lrface.benchmarks.robustness import BENCHMARKS
from lrface.cli import app
from lrface.corrupt import corrupt_set
from lrface.degrade.corruptions import MNIST_SEVERITY
from lrface.errors import LrfaceError, UsageError


def pictures(count, side, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack([cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC) for image in small])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Five photographs of two classes, of which one is broken."""
    root = tmp_path_factory.mktemp("photographs")
    for index, image in enumerate(pictures(5, 260)):
        path = root / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), image[..., ::-1])
    (root / "a/2.png").write_bytes(b"\x89PNG no more")
    return root


def contents(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in (".lock",)
    }


def run(source, out, set, **options):
    return corrupt_set(source, out, set, show_progress=False, **options)


def test_the_layout_of_imagenet_c(photographs, tmp_path):
    names, levels = ["fog", "gaussian_noise"], [1, 5]
    summary = run(
        photographs, tmp_path / "out", "imagenet-c", corruptions=names, severities=levels, batch_size=2
    )
    assert summary.images == 4 and summary.written == 16 and summary.existing == 0
    assert [name for name, _ in summary.broken] == ["a/2.png"] and "1 images left out" in str(summary)
    images = open_images(photographs)
    kind = BENCHMARKS["imagenet_c"]
    for name in ("a/0.png", "b/3.png"):
        clean = prepare(images.read(images.names.index(name)), kind)
        file = tmp_path / "out/gaussian_noise/5" / name.replace(".png", ".JPEG")
        expected = store_lossy(corrupt_images(clean[None], "gaussian_noise", 5, "imagenet_published")[0], 85)
        assert file.read_bytes() == expected
        with Image.open(file) as opened:
            assert opened.size == (224, 224) and opened.format == "JPEG"
    found = open_stored(tmp_path / "out")
    assert found.kind is kind and sorted(found.conditions) == [(n, s) for n in names for s in levels]
    stored = found.open("fog", 1)
    assert list(stored.names) == ["a/0.JPEG", "a/4.JPEG", "b/1.JPEG", "b/3.JPEG"] and stored.classes == [
        "a",
        "b",
    ]
    described = json.loads((tmp_path / "out/corruptions.json").read_text())
    assert described["constants"] == "imagenet_published" and described["broken"][0][0] == "a/2.png"
    assert not list((tmp_path / "out").rglob("*.tmp")) and not (tmp_path / "out/.aside").exists()
    again = run(
        photographs, tmp_path / "out", "imagenet-c", corruptions=names, severities=levels, batch_size=2
    )
    assert again.written == 0 and again.existing == 16 and again.images == 4


def test_neither_batch_nor_workers_matter(photographs, tmp_path):
    options = {"corruptions": ["snow", "shot_noise", "jpeg_compression"], "severities": [3]}
    run(photographs, tmp_path / "one", "imagenet-c", batch_size=1, workers=1, **options)
    run(photographs, tmp_path / "many", "imagenet-c", batch_size=5, workers=3, **options)
    one, many = contents(tmp_path / "one"), contents(tmp_path / "many")
    assert one == many and len(one) == 12 + 2
    run(photographs, tmp_path / "seed", "imagenet-c", seed=1, **options)
    other = contents(tmp_path / "seed")
    assert other["jpeg_compression/3/a/0.JPEG"] == one["jpeg_compression/3/a/0.JPEG"]
    assert other["snow/3/a/0.JPEG"] != one["snow/3/a/0.JPEG"]


def test_a_killed_run_goes_on_to_the_same_files(photographs, tmp_path):
    source = tmp_path / "source"
    for index, image in enumerate(pictures(40, 230, seed=2)):
        (source / "a").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(source / f"a/{index:02d}.png"), image[..., ::-1])
    options = [
        "--set",
        "imagenet-c",
        "--corruptions",
        "fog",
        "--severities",
        "1,5",
        "--batch-size",
        "1",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-m", "lrface.cli", "corrupt", str(source), str(tmp_path / "killed"), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").rglob("*.JPEG")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = len(list((tmp_path / "killed").rglob("*.JPEG")))
    assert 0 < left < 80 and not (tmp_path / "killed/corruptions.json").exists()
    for file in (tmp_path / "killed").rglob("*.JPEG"):
        decode_image(file.read_bytes())  # whole
    same = {"corruptions": ["fog"], "severities": [1, 5]}
    summary = run(source, tmp_path / "killed", "imagenet-c", batch_size=2, **same)
    assert summary.existing >= left and summary.existing + summary.written == 80 and summary.images == 40
    run(source, tmp_path / "whole", "imagenet-c", batch_size=7, **same)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_the_layout_of_cifar_10_c(tmp_path):
    images, labels = pictures(7, 32), np.arange(7) % 3
    np.savez(tmp_path / "clean.npz", images=images, labels=labels)
    run(
        tmp_path / "clean.npz",
        tmp_path / "out",
        "cifar-c",
        corruptions=["snow", "contrast"],
        held_out=True,
        batch_size=2,
    )
    found = np.load(tmp_path / "out/snow.npy")
    assert found.shape == (35, 32, 32, 3) and found.dtype == np.uint8
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.npy")) == sorted(
        ["snow", "contrast", "labels", "speckle_noise", "gaussian_blur", "spatter", "saturate"]
    )
    np.testing.assert_array_equal(np.load(tmp_path / "out/labels.npy"), np.tile(labels, 5))
    for severity in (1, 5):
        expected = corrupt_images(images, "snow", severity, "cifar")
        np.testing.assert_array_equal(found[7 * (severity - 1) : 7 * severity], expected)
    # without what a killed run had not written
    (tmp_path / "out/contrast.npy").rename(tmp_path / "kept.npy")
    summary = run(
        tmp_path / "clean.npz", tmp_path / "out", "cifar-c", corruptions=["snow", "contrast"], held_out=True
    )
    assert summary.written == 35 and summary.existing == 5 * 35
    assert (tmp_path / "kept.npy").read_bytes() == (tmp_path / "out/contrast.npy").read_bytes()
    run(tmp_path / "clean.npz", tmp_path / "some", "cifar-c", corruptions=["snow"], severities=[5, 2])
    stored = open_stored(tmp_path / "some")
    assert sorted(stored.conditions) == [("snow", 2), ("snow", 5)]
    np.testing.assert_array_equal(stored.open("snow", 5).read(3), found[28 + 3])


def test_the_layout_of_mnist_c(tmp_path):
    digits = pictures(5, 28)[..., 0]
    source = tmp_path / "mnist"
    source.mkdir()
    for split, count in (("train", 5), ("test", 2)):
        np.save(source / f"{split}_images.npy", digits[:count])
        np.save(source / f"{split}_labels.npy", np.arange(count))
    summary = run(source, tmp_path / "out", "mnist-c")
    assert summary.corruptions == list(MNIST_SEVERITY) and summary.severities == [1]
    for name, level in MNIST_SEVERITY.items():
        found = np.load(tmp_path / f"out/{name}/train_images.npy")
        assert found.shape == (5, 28, 28, 1)
        np.testing.assert_array_equal(found[..., 0], corrupt_images(digits, name, level, "mnist"))
    assert np.load(tmp_path / "out/zigzag/test_labels.npy").tolist() == [0, 1]
    stored = open_stored(tmp_path / "out")
    assert stored.kind.name == "mnist_c" and stored.clean is not None
    np.testing.assert_array_equal(stored.clean.read(1), digits[1])


def test_faces_are_kept_without_loss(tmp_path):
    images = pictures(2, 112)
    for index, image in enumerate(images):
        (tmp_path / "src/a").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / f"src/a/{index}.png"), image[..., ::-1])
    run(tmp_path / "src", tmp_path / "out", "face", corruptions=["motion_blur"], severities=[4])
    found = decode_image((tmp_path / "out/motion_blur/4/a/1.png").read_bytes())
    np.testing.assert_array_equal(found, corrupt_images(images, "motion_blur", 4, "face")[1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"severities": [0]}, "whole number from 1 to 5; found 0"),
        ({"severities": [6]}, "whole number from 1 to 5; found 6"),
        (
            {"corruptions": ["gausian_noise"]},
            r"unknown corruption 'gausian_noise' \(did you mean 'gaussian_noise'\?\)",
        ),
        ({"set": "imagenetc"}, r"unknown set 'imagenetc' \(did you mean 'imagenet-c'\?\)"),
        ({"set": "mnist-c", "severities": [2]}, "MNIST-C has one severity"),
        ({"set": "mnist-c", "held_out": True}, "no held-out corruptions"),
        ({"batch_size": 0}, "--batch-size"),
    ],
)
def test_wrong_usage_is_named(photographs, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        run(photographs, tmp_path / "out", **{"set": "imagenet-c", **options})
    assert not (tmp_path / "out").exists()


def test_other_peoples_folders_are_left_alone(photographs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="is not empty .it holds letter.txt"):
        run(photographs, tmp_path / "mine", "imagenet-c")
    run(photographs, tmp_path / "out", "imagenet-c", corruptions=["fog"], severities=[1])
    with pytest.raises(UsageError, match="made with other settings: seed was 0, now 1"):
        run(photographs, tmp_path / "out", "imagenet-c", corruptions=["fog"], severities=[1], seed=1)
    with pytest.raises(LrfaceError, match="no such file or folder"):
        run(tmp_path / "nothing", tmp_path / "new", "imagenet-c")
    with pytest.raises(
        LrfaceError, match="none of its images could be corrupted.*CIFAR-10-C takes images of 32x32"
    ):
        run(photographs, tmp_path / "small", "cifar-c")


def test_the_command_line(photographs, tmp_path):
    arguments = [
        "corrupt",
        str(photographs),
        str(tmp_path / "out"),
        "--corruptions",
        "fog",
        "--severities",
        "2",
    ]
    done = CliRunner().invoke(
        app, [*arguments, "--json", "--device", "cpu", "--preview", str(tmp_path / "sheet.png")]
    )
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["written"] == 4 and summary["severities"] == [2] and len(summary["broken"]) == 1
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 300
    assert CliRunner().invoke(app, ["corrupt", str(photographs)]).exit_code == 2
    assert CliRunner().invoke(app, [*arguments[:3], "--severities", "x"]).exit_code == 2


def test_a_preview_shows_every_corruption_and_severity(tmp_path):
    cv2.imwrite(str(tmp_path / "one.png"), pictures(1, 32)[0])
    for set, rows in (("cifar-c", 19), ("mnist-c", 15)):
        if set == "mnist-c":
            cv2.imwrite(str(tmp_path / "one.png"), np.repeat(pictures(1, 28)[0, ..., :1], 3, axis=2))
        done = CliRunner().invoke(
            app,
            ["corrupt", str(tmp_path / "one.png"), "--set", set, "--preview", str(tmp_path / f"{set}.png")],
        )
        assert done.exit_code == 0, done.output
        with Image.open(tmp_path / f"{set}.png") as sheet:
            assert sheet.size[1] > rows * 112
    assert os.path.exists(tmp_path / "cifar-c.png")
