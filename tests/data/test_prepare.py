import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from lrface.data.prepare import Preparation, count_entries, folders_in, image_files, main
from lrface.errors import LrfaceError


def make(*files: Path, content: bytes = b"x") -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def test_counts_other_than_the_published_are_deviations(tmp_path):
    job = Preparation(tmp_path, tmp_path / "out")
    job.count("people", 3, 3)
    job.count("photographs", 1200, 13_233)
    job.count("files", 5)
    assert job.facts == ["3 people (as published)", "1,200 photographs", "5 files"]
    assert job.deviations == ["1,200 photographs; 13,233 were published"] and not job.problems


def test_md5_is_compared_where_the_file_is_there(tmp_path):
    make(tmp_path / "a.tgz", content=b"archive")
    right = hashlib.md5(b"archive", usedforsecurity=False).hexdigest()
    job = Preparation(tmp_path, tmp_path)
    job.md5(tmp_path / "a.tgz", right)
    job.md5(tmp_path / "absent.tgz", right)
    assert job.facts == [f"a.tgz: MD5 {right} (as published)"] and not job.deviations
    job.md5(tmp_path / "a.tgz", "0" * 32)
    assert job.deviations == [f"{tmp_path / 'a.tgz'}: MD5 {right}; {'0' * 32} was published"]


def test_large_files_are_hashed_only_when_strict(tmp_path):
    with open(tmp_path / "large.tar", "wb") as file:
        file.truncate(65 * 2**20)
    for strict in (False, True):
        job = Preparation(tmp_path, tmp_path, strict=strict)
        job.md5(tmp_path / "large.tar", "0" * 32)
        assert bool(job.deviations) == strict


def test_what_is_not_found_is_named(tmp_path):
    make(tmp_path / "b/c.txt")
    job = Preparation(tmp_path, tmp_path)
    assert job.find("a", "b/c.txt", what="the list") == tmp_path / "b/c.txt"
    with pytest.raises(LrfaceError, match="the list not found; looked for a, d there"):
        job.find("a", "d", what="the list")


@pytest.mark.parametrize("copy", [False, True])
def test_folders_and_files_are_put_in_place_once(tmp_path, copy):
    make(tmp_path / "src/images/A/1.jpg", tmp_path / "src/pairs.txt")
    for _ in range(2):  # the second time everything is there
        job = Preparation(tmp_path / "src", tmp_path / "out", copy=copy)
        job.place(tmp_path / "src/images", "set/images")
        job.place(tmp_path / "src/pairs.txt", "set/pairs.txt")
        if copy and (tmp_path / "out").exists():
            with pytest.raises(LrfaceError, match="something else"):
                job.put_in_place()
        else:
            job.put_in_place()
    assert (tmp_path / "out/set/images/A/1.jpg").read_bytes() == b"x"
    assert (tmp_path / "out/set/pairs.txt").is_symlink() != copy
    assert sorted(os.listdir(tmp_path / "out/set")) == ["images", "pairs.txt"]


def test_nothing_is_overwritten(tmp_path):
    make(tmp_path / "src/pairs.txt", tmp_path / "out/set/pairs.txt")
    job = Preparation(tmp_path / "src", tmp_path / "out")
    job.place(tmp_path / "src/pairs.txt", "set/pairs.txt")
    with pytest.raises(LrfaceError, match="exists already and is something else"):
        job.put_in_place()
    (tmp_path / "file").write_text("")
    job = Preparation(tmp_path / "src", tmp_path / "file")
    job.place(tmp_path / "src/pairs.txt", "set/pairs.txt")
    with pytest.raises(LrfaceError, match="cannot write"):
        job.put_in_place()


def test_arrays_are_checked_and_never_unpickled(tmp_path):
    np.save(tmp_path / "good.npy", np.zeros((4, 2), np.uint8))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    make(tmp_path / "broken.npy", content=b"\x93NUMPY\x01\x00v\x00{'descr'")
    job = Preparation(tmp_path, tmp_path)
    assert job.array(tmp_path / "good.npy", (4, 2), np.uint8) is not None
    assert job.array(tmp_path / "good.npy", (4, 2)) is not None and not job.problems
    assert job.array(tmp_path / "good.npy", (4, 3), np.uint8) is None
    assert job.array(tmp_path / "good.npy", (4, 2), np.float32) is None
    for name in ("objects", "broken", "absent"):
        assert job.array(tmp_path / f"{name}.npy", (1,)) is None
    assert "[4, 3] is expected, found [4, 2] of uint8" in job.problems[0]
    assert len(job.problems) == 5 and all("cannot be read" in problem for problem in job.problems[2:])


def test_images_and_folders_are_counted(tmp_path):
    make(
        *(
            tmp_path / name
            for name in ("a/1.jpg", "a/2.PNG", "a/notes.txt", "a/.3.jpg", "b/1.jpeg", ".c/1.jpg", "4.jpg")
        )
    )
    assert [folder.name for folder in folders_in(tmp_path)] == ["a", "b"]
    assert count_entries(folders_in(tmp_path), "count") == 3
    assert sorted(path.name for path in image_files(tmp_path / "a")) == ["1.jpg", "2.PNG"]
    with pytest.raises(LrfaceError, match="cannot be listed"):
        folders_in(tmp_path / "absent")


def run(prepare, tmp_path: Path, *arguments: str) -> int:
    make(tmp_path / "src/pairs.txt")
    return main("what it does", prepare, [str(tmp_path / "src"), *arguments])


def test_exit_codes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LRFACE_DATA", str(tmp_path / "variable"))

    def deviating(job: Preparation) -> None:
        job.count("people", 3, 4)
        job.place(job.source / "pairs.txt", "set/pairs.txt")
        job.next_command = f"look at {job.out}"

    assert run(deviating, tmp_path, str(tmp_path / "out"), "--check") == 0
    assert not (tmp_path / "out").exists()
    assert run(deviating, tmp_path, str(tmp_path / "out"), "--strict") == 1
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr()
    assert (
        "deviation: 3 people; 4 were published" in printed.out and "nothing was put in place" in printed.err
    )
    assert run(deviating, tmp_path, str(tmp_path / "out")) == 0
    assert (tmp_path / "out/set/pairs.txt").read_bytes() == b"x"
    assert f"look at {tmp_path / 'out'}" in capsys.readouterr().out
    assert run(deviating, tmp_path) == 0 and (tmp_path / "variable/set/pairs.txt").is_file()

    def useless(job: Preparation) -> None:
        job.place(job.source / "pairs.txt", "other/pairs.txt")
        job.missing(["a", "b"], job.source, "photographs")

    assert run(useless, tmp_path, str(tmp_path / "out")) == 1
    assert "problem: 2 photographs are not in" in capsys.readouterr().out
    assert not (tmp_path / "out/other").exists()

    def raising(job: Preparation) -> None:
        job.find("images", what="the photographs")

    assert run(raising, tmp_path, str(tmp_path / "out")) == 1
    assert "problem: " in capsys.readouterr().out
    assert main("", raising, [str(tmp_path / "absent")]) == 1
    assert "no such folder" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main("", raising, [])
    assert stop.value.code == 2
