import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from typer.testing import CliRunner

from lrface.benchmarks.corrupted import content_seeds, corrupt_images
from lrface.benchmarks.image_sets import batches, check_labels, find_images, open_images, open_stored, prepare
from lrface.benchmarks.robustness import BENCHMARKS
from lrface.cli import app
from lrface.data.decode import BrokenImage
from lrface.degrade.corruptions import CORRUPTIONS
from lrface.errors import LrfaceError, UsageError


def pictures(count, side, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack([cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC) for image in small])


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])


def test_clean_images_of_every_form(tmp_path):
    images = pictures(4, 32)
    for index, image in enumerate(images):
        write(tmp_path / f"folders/{'ab'[index // 2]}/{index}.png", image)
        write(tmp_path / f"wnids/n0000000{index % 2 + 1}_{index}.png", image)
        write(tmp_path / f"flat/{index}.png", image)
    labels = np.array([0, 0, 1, 1])
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    np.savez(tmp_path / "both.npz", images=images, labels=labels)
    for name in ("folders", "x.npy", "both.npz"):
        found = open_images(tmp_path / name)
        assert check_labels(found).tolist() == [0, 0, 1, 1] and len(found) == 4
        np.testing.assert_array_equal(np.stack([found.read(index) for index in range(4)]), images)
    assert open_images(tmp_path / "folders").classes == ["a", "b"]
    found = open_images(tmp_path / "wnids")
    assert found.classes == ["n00000001", "n00000002"] and check_labels(found).tolist() == [0, 0, 1, 1]
    with pytest.raises(UsageError, match="nothing says which class"):
        check_labels(open_images(tmp_path / "flat"))


def test_arrays_that_are_none(tmp_path):
    np.save(tmp_path / "float.npy", np.zeros((2, 4, 4, 3), np.float32))
    with pytest.raises(LrfaceError, match="float.npy: images must be uint8.*float32"):
        open_images(tmp_path / "float.npy")
    np.savez(tmp_path / "other.npz", pixels=np.zeros(3))
    with pytest.raises(LrfaceError, match="other.npz: holds pixels"):
        open_images(tmp_path / "other.npz")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(LrfaceError, match="no readable .npy"):
        open_images(tmp_path / "objects.npy")


def test_imagenet_images_are_prepared_as_published(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (300, 410, 3), dtype=np.uint8)
    published = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    expected = np.asarray(published(Image.fromarray(image)))
    np.testing.assert_array_equal(prepare(image, BENCHMARKS["imagenet_c"]), expected)
    for name, shape in (
        ("cifar10_c", (33, 32, 3)),
        ("tiny_imagenet_c", (32, 32, 3)),
        ("mnist_c", (28, 28, 3)),
    ):
        with pytest.raises(BrokenImage, match="takes images of"):
            prepare(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), BENCHMARKS[name])
    grey = np.repeat(np.arange(784, dtype=np.uint32).astype(np.uint8).reshape(28, 28, 1), 3, axis=2)
    np.testing.assert_array_equal(prepare(grey, BENCHMARKS["mnist_c"]), grey[..., 0])
    assert prepare(np.zeros((32, 32), np.uint8), BENCHMARKS["cifar10_c"]).shape == (32, 32, 3)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_becomes_the_same_in_any_batch(name):
    images = pictures(3, 32)
    together = corrupt_images(images, name, 3, "cifar", seed=1)
    for index in (2, 0):
        np.testing.assert_array_equal(
            corrupt_images(images[index : index + 1], name, 3, "cifar", seed=1)[0], together[index]
        )
    assert together.dtype == np.uint8 and together.shape == images.shape
    assert not np.array_equal(together, images)


def test_seeds_differ_by_content_and_salt():
    images = pictures(2, 8)
    seeds = content_seeds(images, "fog 1")
    assert (
        len({*seeds.tolist(), *content_seeds(images, "fog 2").tolist()}) == 4 and seeds.dtype == torch.int64
    )
    noisy = [corrupt_images(images, "gaussian_noise", 3, "cifar", seed) for seed in (0, 1, 0)]
    assert np.array_equal(noisy[0], noisy[2]) and not np.array_equal(noisy[0], noisy[1])


def test_unreadable_images_are_told_and_the_rest_goes_on(tmp_path):
    for index, image in enumerate(pictures(4, 32)):
        write(tmp_path / f"a/{index}.png", image)
    (tmp_path / "a/1.png").write_bytes(b"no image")
    write(tmp_path / "a/3.png", pictures(1, 20)[0])
    images = open_images(tmp_path)
    found = list(batches(images.read, range(4), 3, 2))
    assert [rows for rows, _, _ in found] == [[0, 2], []]
    reasons = {index: reason for _, _, failed in found for index, reason in failed}
    assert "no JPEG" in reasons[1] and "its shape is [20, 20, 3]" in reasons[3]


def test_stored_sets_that_are_wrong(tmp_path):
    with pytest.raises(LrfaceError, match="no corrupted set"):
        open_stored(tmp_path)
    np.save(tmp_path / "fog.npy", np.zeros((10, 32, 32, 3), np.uint8))
    with pytest.raises(LrfaceError, match="labels.npy does not exist"):
        open_stored(tmp_path)
    np.save(tmp_path / "labels.npy", np.zeros(9, np.uint8))
    with pytest.raises(LrfaceError, match="fog.npy: 10 images, 9 labels"):
        open_stored(tmp_path)
    np.save(tmp_path / "labels.npy", np.zeros(10, np.uint8))
    found = open_stored(tmp_path)
    assert found.kind.name == "cifar10_c" and len(found.open("fog", 5)) == 2
    with pytest.raises(LrfaceError, match="holds no snow at severity 1; found fog"):
        found.open("snow", 1)


def test_folders_of_groups_are_looked_into(tmp_path):
    for name in ("weather/fog", "snow"):
        write(tmp_path / f"{name}/2/a/0.png", pictures(1, 224)[0])
    found = open_stored(tmp_path)
    assert set(found.conditions) == {("fog", 2), ("snow", 2)} and found.kind.name == "imagenet_c"
    with pytest.raises(LrfaceError, match="holds no fog at severity 3; found severities 2 of it"):
        found.open("fog", 3)


@pytest.mark.parametrize(("version", "count"), [("v4", 2021), ("v6", 2000)])
def test_cifar_10_1_by_file_and_by_folder(tmp_path, version, count):
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = (np.arange(count) % 10).astype(np.int32)
    np.save(tmp_path / f"cifar10.1_{version}_data.npy", images)
    with pytest.raises(LrfaceError, match=f"cifar10.1_{version}_labels.npy does not exist"):
        open_images(tmp_path)
    np.save(tmp_path / f"cifar10.1_{version}_labels.npy", labels)
    for path in (tmp_path, tmp_path / f"cifar10.1_{version}_data.npy"):
        found = open_images(path)
        assert len(found) == count and check_labels(found).tolist() == labels.tolist()
        np.testing.assert_array_equal(found.read(count - 1), images[-1])
    np.save(tmp_path / f"cifar10.1_{version}_data.npy", images[:-1])
    with pytest.raises(
        LrfaceError, match=rf"{version}_data.npy: .*\[{count}, 32, 32, 3\]; found \[{count - 1}"
    ):
        open_images(tmp_path)
    np.save(tmp_path / f"cifar10.1_{version}_data.npy", images)
    np.save(tmp_path / f"cifar10.1_{version}_labels.npy", labels + 1)
    with pytest.raises(LrfaceError, match="from 1 to 10"):
        open_images(tmp_path)
    np.save(tmp_path / f"cifar10.1_{version}_labels.npy", np.array([{}] * count), allow_pickle=True)
    with pytest.raises(LrfaceError, match="no readable .npy"):
        open_images(tmp_path)


def test_both_versions_of_cifar_10_1_need_a_name(tmp_path):
    for version in ("v4", "v6"):
        (tmp_path / f"cifar10.1_{version}_data.npy").touch()
    with pytest.raises(
        UsageError, match="holds both versions of CIFAR-10.1; name one: .*v4_data.npy or .*v6_data.npy"
    ):
        open_images(tmp_path)


def test_images_are_looked_for_where_data_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for root in ("given", "named"):
        write(tmp_path / root / "set/a/0.png", pictures(1, 32)[0])
    monkeypatch.setenv("LRFACE_DATA", str(tmp_path / "named"))
    assert find_images("set") == tmp_path / "named/set"
    assert find_images("set", tmp_path / "given") == tmp_path / "given/set"
    assert open_images("set").origin == str(tmp_path / "named/set")
    write(tmp_path / "set/a/0.png", pictures(1, 32)[0])
    assert str(find_images("set")) == "set"
    with pytest.raises(
        LrfaceError, match=r"nowhere: no such file or directory; looked at nowhere, .*named/nowhere"
    ):
        open_images("nowhere")


@pytest.mark.parametrize(
    "command",
    [
        "perturbation MODEL --images photos",
        "attack MODEL --images photos",
        "deepaugment photos --network RUN --out set",
        "robustness MODEL --benchmark cifar10_c --clean photos",
        "robustness MODEL --benchmark cifar10_c --clean a --shifted photos",
    ],
)
def test_commands_look_for_images_in_the_data_folder(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a/b/0.png", pictures(1, 32)[0])
    (tmp_path / "root").mkdir()
    result = CliRunner().invoke(app, [*command.split(), "--data", "root"])
    assert result.exit_code == 1 and "root/photos" in result.stderr, result.output
