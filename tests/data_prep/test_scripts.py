"""Every script of data_prep/ on a small set in the official layout, as its users have it after unpacking."""

import gzip
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.io

from lrface.benchmarks.locate import locate_benchmark
from lrface.benchmarks.tinyface import find_tinyface, read_tinyface
from lrface.data.prepare import main

FOLDER = Path(__file__).resolve().parents[2] / "data_prep"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture(autouse=True)
def no_other_data(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LRFACE_DATA", raising=False)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"data_prep_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, tmp_path: Path, *flags: str) -> int:
    module = script(name)
    return main(module.__doc__, module.prepare, [str(tmp_path / "src"), str(tmp_path / "out"), *flags])


def make(*files: Path, content: bytes = b"image") -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def cell(items: list, shape: tuple[int, ...] = (-1, 1)) -> np.ndarray:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array.reshape(shape)


def small_lfw(src: Path) -> None:
    make(*(src / f"lfw-deepfunneled/{name}/{name}_000{n}.jpg" for name in "AB" for n in (1, 2)))
    (src / "pairs.txt").write_text("1\t1\nA\t1\t2\nA\t1\tB\t2\n")


def small_cfp(src: Path) -> None:
    lists = {"F": "", "P": ""}
    for person in (1, 2):
        for kind, letter in (("frontal", "F"), ("profile", "P")):
            make(src / f"cfp-dataset/Data/Images/{person:03d}/{kind}/01.jpg")
            lists[letter] += f"{person} ../Data/Images/{person:03d}/{kind}/01.jpg\n"
    for split in ("FP", "FF"):
        folder = src / f"cfp-dataset/Protocol/Split/{split}/01"
        folder.mkdir(parents=True)
        (folder / "same.txt").write_text("1,1\n2,2\n")
        (folder / "diff.txt").write_text("1,2\n2,1\n")
    for letter, text in lists.items():
        (src / f"cfp-dataset/Protocol/Pair_list_{letter}.txt").write_text(text)


def small_agedb(src: Path) -> None:
    names = ["1_Ann_1_A_20", "1_Ann_2_A_60", "2_Bo_7_A_18"]
    make(*(src / f"03_Protocol_Images/{name}.jpg" for name in names))
    pairs = [(names[0], names[1], 1), (names[0], names[2], -1)]
    sides = [{"name": pair[side], "age": 1} for side in (0, 1) for pair in pairs]
    content = {"pairs": cell(sides, (2, 2)), "annot": np.array([[1, -1]], np.int8)}
    scipy.io.savemat(src / "04_FINAL_protocol_30_years.mat", {"splits": cell([content])})


def small_two_lines(src: Path, name: str, images: str) -> None:
    make(*(src / images / f"{letter}_{n}.jpg" for letter in "AB" for n in (1, 2)))
    (src / f"pairs_{name}.txt").write_text("A_1.jpg 1\nA_2.jpg 1\nA_1.jpg 0\nB_2.jpg 0\n")


def small_tinyface(src: Path) -> None:
    testing = src / "tinyface/Testing_Set"
    make(*(testing / f"Gallery_Match/{n}_1.jpg" for n in (1, 2)), testing / "Probe/1_2.jpg")
    make(*(testing / f"Gallery_Distractor/d{n}.jpg" for n in range(3)), src / "tinyface/Training_Set/7/1.jpg")
    for name, part in (("gallery_match_img_ID_pairs", "gallery"), ("probe_img_ID_pairs", "probe")):
        files = ["1_1.jpg", "2_1.jpg"] if part == "gallery" else ["1_2.jpg"]
        ids = np.array([[int(file[0])] for file in files], np.uint16)
        scipy.io.savemat(testing / f"{name}.mat", {f"{part}_set": cell(files), f"{part}_ids": ids})


def small_casia(src: Path) -> None:
    make(*(src / f"CASIA-WebFace/{person}/{n:03d}.jpg" for person in ("0000045", "0000099") for n in (1, 2)))


def small_cifar10_c(src: Path) -> None:
    """Of the full shape, but empty: files with a hole take no room."""
    folder = src / "CIFAR-10-C"
    folder.mkdir(parents=True)
    np.save(folder / "labels.npy", np.zeros(50_000, np.uint8))
    for name in script("cifar10_c").MD5:
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.uint8, (50_000, 32, 32, 3))


def small_imagenet_c(src: Path) -> None:
    for severity in range(1, 6):
        make(src / f"noise/gaussian_noise/{severity}/n01440764/a.JPEG")


def small_mnist(src: Path) -> None:
    src.mkdir(parents=True)
    for split, count in (("train", 3), ("t10k", 2)):
        shape = b"".join(side.to_bytes(4, "big") for side in (count, 28, 28))
        images = b"\0\0\x08\x03" + shape + bytes(count * 28 * 28)
        (src / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (src / f"{split}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + shape[:4] + bytes(count))


SMALL = {
    "lfw": small_lfw,
    "cfp_fp": small_cfp,
    "agedb30": small_agedb,
    "calfw": lambda src: small_two_lines(src, "CALFW", "images&landmarks/images&landmarks/images"),
    "cplfw": lambda src: small_two_lines(src, "CPLFW", "images"),
    "tinyface": small_tinyface,
    "casia_webface": small_casia,
    "mnist": small_mnist,
    "cifar10_c": small_cifar10_c,
    "imagenet_c": small_imagenet_c,
}
IN_PLACE = {
    "lfw": ["lfw/images", "lfw/pairs.txt"],
    "cfp_fp": ["cfp/Data/Images", "cfp/Protocol"],
    "agedb30": ["agedb30/03_Protocol_Images", "agedb30/04_FINAL_protocol_30_years.mat"],
    "calfw": ["calfw/images", "calfw/pairs_CALFW.txt"],
    "cplfw": ["cplfw/images", "cplfw/pairs_CPLFW.txt"],
    "tinyface": ["tinyface/Testing_Set", "tinyface/Training_Set"],
    "casia_webface": ["casia_webface/photographs"],
    "mnist": ["mnist/train/train-images-idx3-ubyte.gz", "mnist/test/t10k-labels-idx1-ubyte"],
    "cifar10_c": ["cifar10_c"],
    "imagenet_c": ["imagenet_c/gaussian_noise"],
}


def test_there_is_a_script_and_a_line_of_the_table_for_every_data_set():
    assert SCRIPTS == sorted(SMALL)
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in SCRIPTS:
        assert f"| {name}.py |" in table
        text = script(name).__doc__ or ""
        for heading in ("Source:", "Licence:", "Published:", "Prepare:", "Checks:", "Places:"):
            assert heading in text, (name, heading)
        assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 80


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_small_set_is_put_in_place_and_its_counts_are_deviations(name, tmp_path, capsys):
    SMALL[name](tmp_path / "src")
    if name != "cifar10_c":  # 3 GB to hash
        assert run(name, tmp_path, "--strict") == 1
        assert not (tmp_path / "out").exists()
        capsys.readouterr()
    assert run(name, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "problem" not in printed
    assert "deviation: " in printed
    for place in IN_PLACE[name]:
        assert (tmp_path / "out" / place).exists(), place
    assert run(name, tmp_path) == 0  # once more: it is there already


@pytest.mark.parametrize("name", ["lfw", "cfp_fp", "cfp_ff", "agedb30", "calfw", "cplfw"])
def test_what_is_in_place_is_found_by_verify(name, tmp_path):
    preparing = "cfp_fp" if name == "cfp_ff" else name
    SMALL[preparing](tmp_path / "src")
    assert run(preparing, tmp_path) == 0
    found = locate_benchmark(name, data=tmp_path / "out")
    assert found.kind == "folder" and found.name == name


def test_tinyface_in_place_is_found(tmp_path):
    small_tinyface(tmp_path / "src")
    assert run("tinyface", tmp_path) == 0
    found = read_tinyface(find_tinyface(tmp_path / "out"))
    assert found.counts() == {"Probe": 1, "Gallery_Match": 2, "Gallery_Distractor": 3}


BROKEN = {
    "lfw": ("lfw-deepfunneled/B/B_0002.jpg", "1 photographs of pairs are not in .*: B 2"),
    "cfp_fp": (
        "cfp-dataset/Data/Images/002/profile/01.jpg",
        "1 photographs of pairs FP .*002/profile/01.jpg",
    ),
    "agedb30": ("03_Protocol_Images/2_Bo_7_A_18.jpg", "2_Bo_7_A_18"),
    "calfw": ("pairs_CALFW.txt", "the file of pairs not found"),
    "cplfw": ("images/B_2.jpg", "1 photographs of pairs are not in .*B_2.jpg"),
    "tinyface": ("tinyface/Testing_Set/Probe/1_2.jpg", "1 images that it names"),
    "casia_webface": ("CASIA-WebFace/*/*.jpg", "no image in any folder"),
    "mnist": ("t10k-labels-idx1-ubyte", "t10k-labels-idx1-ubyte not found"),
    "cifar10_c": ("CIFAR-10-C/fog.npy", "fog.npy: cannot be read as an array"),
    "imagenet_c": ("noise", "no corruption found"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_set_that_lacks_something_is_refused(name, tmp_path, capsys):
    import re

    SMALL[name](tmp_path / "src")
    pattern, found = BROKEN[name]
    for path in list((tmp_path / "src").glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run(name, tmp_path) == 1
    printed = capsys.readouterr()
    assert re.search(f"problem: .*{found}", printed.out), printed.out
    assert not (tmp_path / "out").exists() and "nothing was put in place" in printed.err


def test_wrong_arrays_of_cifar10_c_are_named(tmp_path, capsys):
    small_cifar10_c(tmp_path / "src")
    folder = tmp_path / "src/CIFAR-10-C"
    np.save(folder / "fog.npy", np.zeros((10_000, 32, 32, 3), np.uint8))
    np.lib.format.open_memmap(folder / "snow.npy", "w+", np.int8, (50_000, 32, 32, 3))
    np.save(folder / "labels.npy", np.full(50_000, 10, np.uint8))
    assert run("cifar10_c", tmp_path) == 1
    printed = capsys.readouterr().out
    assert "fog.npy: [50000, 32, 32, 3] is expected, found [10000, 32, 32, 3] of uint8" in printed
    assert "snow.npy: [50000, 32, 32, 3] is expected, found [50000, 32, 32, 3] of int8" in printed
    assert "labels are 0 to 9, found 10 to 10" in printed


def test_agedb_as_it_is_given_out_without_the_protocols_photographs(tmp_path, capsys):
    small_agedb(tmp_path / "src")
    shutil.rmtree(tmp_path / "src/03_Protocol_Images")
    make(tmp_path / "src/AgeDB/0_MariaCallas_35_f.jpg", tmp_path / "src/AgeDB/1_LaurenBacall_60_f.jpg")
    assert run("agedb30", tmp_path) == 1
    printed = capsys.readouterr().out
    assert (
        "2 photographs named ID_NAME_AGE_GENDER" in printed and "problem: 3 photographs of pairs" in printed
    )


def test_a_script_is_a_command(tmp_path):
    small_lfw(tmp_path / "src")
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, str(FOLDER / "lfw.py")]
    done = subprocess.run(
        [*command, str(tmp_path / "src"), str(tmp_path / "out"), "--strict"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1 and "2 people; 5,749 were published" in done.stdout
    command = [sys.executable, str(FOLDER / "cifar10_c.py"), "--help"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert shown.returncode == 0 and "Zenodo record 2535967" in shown.stdout


def test_the_real_lfw_is_in_order(shared, tmp_path, capsys):
    module = script("lfw")
    arguments = [str(shared / "data/lfw"), str(tmp_path / "out"), "--strict"]
    assert main(module.__doc__, module.prepare, arguments) == 0
    printed = capsys.readouterr().out
    for fact in ("5,749 people", "13,233 photographs", "6,000 pairs", "9f1ba174e4e1c508ff7cdf10ac338a7d"):
        assert f"{fact} (as published)" in printed
    assert locate_benchmark("lfw", data=tmp_path / "out").kind == "folder"
