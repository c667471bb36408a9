import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lrface import files
from lrface.errors import LrfaceError


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with files.atomic_file(path) as aside:
        aside.write_text("one")
        assert aside.parent == path.parent and not path.exists()
    assert path.read_text() == "one" and entries(path.parent) == ["a.txt"]


def test_what_fails_midway_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.atomic_file(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and entries(tmp_path) == ["a.txt"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with (
        pytest.raises(LrfaceError, match="cannot write .*a.txt: the disk is full"),
        files.atomic_file(path) as aside,
    ):
        aside.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "old" and entries(tmp_path) == ["a.txt"]


def test_a_disk_that_is_really_full(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:
        files.write_text(folder / "a.txt", "old")
        with pytest.raises(LrfaceError, match="the disk is full"):
            files.write_text(folder / "a.txt", "x" * 200_000)
        assert (folder / "a.txt").read_text() == "old" and entries(folder) == ["a.txt"]
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LrfaceError, match="cannot write .*file/a.txt"):
        files.write_text(tmp_path / "file" / "a.txt", "x")


def test_a_directory_appears_whole(tmp_path):
    path = tmp_path / "step"
    with files.atomic_directory(path) as aside:
        (aside / "a").write_text("1")
        assert not path.exists()
    assert entries(path) == ["a"] and entries(tmp_path) == ["step"]
    with files.atomic_directory(path) as aside:
        (aside / "b").write_text("2")
    assert entries(path) == ["b"] and entries(tmp_path) == ["step"]


def test_a_directory_that_fails_midway_leaves_the_old_one(tmp_path):
    path = tmp_path / "step"
    with files.atomic_directory(path) as aside:
        (aside / "a").write_text("1")
    with pytest.raises(LrfaceError, match="cannot write .*step: the disk is full"):
        with files.atomic_directory(path) as aside:
            (aside / "b").write_text("2")
            raise OSError(errno.ENOSPC, "full")
    assert entries(path) == ["a"] and entries(tmp_path) == ["step"]


def test_leftovers_of_a_killed_process_of_the_same_number_do_not_stand_in_the_way(tmp_path):
    # In a container the process number is often the same at every start.
    left = tmp_path / f".step.{os.getpid()}.tmp"
    left.mkdir()
    (left / "half").write_text("")
    with files.atomic_directory(tmp_path / "step") as aside:
        (aside / "a").write_text("1")
    assert entries(tmp_path / "step") == ["a"] and entries(tmp_path) == ["step"]


def test_everything_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (calls.append("sync"), fsync(fd)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    files.write_text(tmp_path / "a.txt", "x")
    assert calls == ["sync", "rename", "sync"]


def test_json(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"name": "Zoë", "value": 0.1})
    assert files.read_json(path, "a card") == {"name": "Zoë", "value": 0.1}
    with pytest.raises(LrfaceError, match=r"missing.json \(a card\) does not exist"):
        files.read_json(tmp_path / "missing.json", "a card")
    path.write_text("{")
    with pytest.raises(LrfaceError, match=r"a.json \(a card\) cannot be read"):
        files.read_json(path, "a card")
    path.write_text("[1]")
    with pytest.raises(LrfaceError, match=r"a.json \(a card\) must hold a JSON object; found list"):
        files.read_json(path, "a card")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(LrfaceError, match=r"a.json \(a card\) cannot be read"):
        files.read_json(path, "a card")


def test_a_folder_is_worked_on_by_one_process_at_a_time(tmp_path):
    take = (
        "import sys; from lrface.files import locked\n"
        "with locked(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", take, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with pytest.raises(LrfaceError, match="another run is working on it"), files.locked(tmp_path / "run"):
        raise AssertionError("two runs hold one folder")
    first.kill()
    first.wait()
    with files.locked(tmp_path / "run"):  # what the killed process held is free
        pass
