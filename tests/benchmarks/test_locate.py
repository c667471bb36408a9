from pathlib import Path

import pytest

from lrface.benchmarks.locate import (
    KNOWN_BENCHMARKS,
    cache_root,
    data_roots,
    describe_layouts,
    known_benchmark,
    locate_benchmark,
)
from lrface.errors import LrfaceError, UsageError


@pytest.fixture(autouse=True)
def empty_places(tmp_path, monkeypatch):
    """No data of this machine is seen: home is empty and the variables are not set."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("LRFACE_DATA", raising=False)
    monkeypatch.delenv("LRFACE_CACHE", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return home


def make(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")


def make_lfw(root: Path) -> None:
    make(root / "lfw/pairs.txt", root / "lfw/images/A/A_0001.jpg")


def test_names_are_taken_in_any_spelling():
    for spelling in ("agedb30", "agedb_30", "AgeDB-30", "agedb"):
        assert known_benchmark(spelling).name == "agedb30"
    for spelling in ("cfp_fp", "cfp-fp", "CFPFP"):
        assert known_benchmark(spelling).name == "cfp_fp"
    assert known_benchmark("imagenet") is None and known_benchmark("_") is None
    assert set(KNOWN_BENCHMARKS) >= {"lfw", "agedb30", "cfp_fp", "cfp_ff", "calfw", "cplfw"}


def test_order_of_places(tmp_path, monkeypatch, empty_places):
    flag, variable, cache = tmp_path / "flag", tmp_path / "variable", empty_places / ".cache/lrface"
    monkeypatch.setenv("LRFACE_DATA", str(variable))
    for root in (cache, variable, flag):
        make(root / "agedb_30.bin")
        found = locate_benchmark("agedb30", data=flag if flag.exists() else None)
        assert (found.kind, found.path, found.name) == ("pack", root / "agedb_30.bin", "agedb30")
    assert [origin for origin, _ in data_roots(flag)] == ["--data", "$LRFACE_DATA", "~/.cache/lrface"]


def test_later_places_are_searched_when_the_flag_lacks_it(tmp_path, empty_places):
    (tmp_path / "flag").mkdir()
    make(empty_places / ".cache/lrface/cfp_fp.bin")
    assert (
        locate_benchmark("cfp_fp", data=tmp_path / "flag").path == empty_places / ".cache/lrface/cfp_fp.bin"
    )


def test_lfw_photographs_come_before_the_pack(tmp_path):
    make(tmp_path / "lfw.bin")
    assert locate_benchmark("lfw", data=tmp_path).kind == "pack"
    make_lfw(tmp_path)
    found = locate_benchmark("LFW", data=tmp_path)
    assert (found.kind, found.path, found.pairs) == (
        "folder",
        tmp_path / "lfw/images",
        tmp_path / "lfw/pairs.txt",
    )
    assert locate_benchmark("lfw.bin", data=tmp_path).path == tmp_path / "lfw.bin"


def test_a_folder_of_that_name_holds_packed_data_or_the_pack(tmp_path):
    make(tmp_path / "lfw/pairs.txt", tmp_path / "lfw/index.json", tmp_path / "calfw/calfw.bin")
    assert locate_benchmark("lfw", data=tmp_path).kind == "packed"
    assert locate_benchmark("calfw", data=tmp_path).path == tmp_path / "calfw/calfw.bin"


def test_a_missing_benchmark_names_every_place_and_what_to_do(tmp_path, monkeypatch, empty_places):
    flag = tmp_path / "my data"
    flag.mkdir()
    monkeypatch.setenv("LRFACE_DATA", str(tmp_path / "variable"))
    with pytest.raises(LrfaceError) as stop:
        locate_benchmark("cfp-fp", data=flag)
    message = str(stop.value)
    assert not isinstance(stop.value, UsageError)
    for place in (flag, tmp_path / "variable", empty_places / ".cache/lrface"):
        assert str(place / "cfp_fp.bin") in message
        assert str(place / "cfp_fp" / "pairs.txt") in message
    assert "faces_emore" in message
    assert f"mkdir -p '{flag}' && cp cfp_fp.bin '{flag}'/" in message
    assert "--data FOLDER" in message
    assert "http" not in message


def test_missing_lfw_says_how_to_lay_out_the_photographs(empty_places):
    with pytest.raises(LrfaceError) as stop:
        locate_benchmark("lfw")
    message = str(stop.value)
    root = empty_places / ".cache/lrface"
    assert f"{root / 'lfw/pairs.txt'} with {root / 'lfw/images'}" in message
    assert "tar -xzf lfw-deepfunneled.tgz --strip-components=1" in message
    assert "$LRFACE_DATA is not set" in message


def test_the_command_that_the_message_gives_works(tmp_path, empty_places, monkeypatch):
    """Follow the advice for LFW literally: archive and pairs lie in the current directory."""
    import subprocess
    import tarfile

    make(tmp_path / "pack/lfw-deepfunneled/A/A_0001.jpg")
    Path("pairs.txt").write_text("1\t1\n")
    with tarfile.open("lfw-deepfunneled.tgz", "w:gz") as archive:
        archive.add(tmp_path / "pack/lfw-deepfunneled", "lfw-deepfunneled")
    with pytest.raises(LrfaceError) as stop:
        locate_benchmark("lfw")
    command = next(line for line in str(stop.value).splitlines() if "tar -xzf" in line)
    subprocess.run(command, shell=True, check=True)
    found = locate_benchmark("lfw")
    assert found.kind == "folder" and (found.path / "A/A_0001.jpg").is_file()


def test_unknown_names_get_the_nearest():
    with pytest.raises(UsageError, match="Did you mean cfp_fp") as stop:
        locate_benchmark("cfp_pf")
    assert describe_layouts() in str(stop.value)
    with pytest.raises(UsageError, match="Did you mean agedb30"):
        locate_benchmark("agedb_3")
    with pytest.raises(UsageError, match="no known benchmark") as stop:
        locate_benchmark("zzzzzz")
    assert "Did you mean" not in str(stop.value)


def test_folders_by_path(tmp_path):
    make(tmp_path / "a/pairs.txt", tmp_path / "a/images/N/N_0001.jpg")
    make(tmp_path / "b/pairs.txt", tmp_path / "b/N/N_0001.jpg")
    make(tmp_path / "c/pairs.txt", tmp_path / "c/index.json")
    make(tmp_path / "d/pairs.txt", tmp_path / "d/lfw-deepfunneled/N/N_0001.jpg")
    for name, kind, images in (("a", "folder", "images"), ("b", "folder", ""), ("c", "packed", "")):
        found = locate_benchmark(str(tmp_path / name))
        assert (found.name, found.kind) == (name, kind)
        assert found.path.resolve() == (tmp_path / name / images).resolve()
    assert locate_benchmark(tmp_path / "d").path == tmp_path / "d/lfw-deepfunneled"


def test_a_known_name_wins_over_a_folder_here_but_not_over_a_path(tmp_path):
    make_lfw(Path("."))
    make_lfw(tmp_path / "root")
    assert locate_benchmark("lfw", data=tmp_path / "root").path == tmp_path / "root/lfw/images"
    assert locate_benchmark("./lfw", data=tmp_path / "root").path.resolve() == Path("lfw/images").resolve()
    make(Path("mine/pairs.txt"), Path("mine/images/A/A_0001.jpg"))
    assert locate_benchmark("mine").name == "mine"


def test_pairs_may_lie_elsewhere(tmp_path):
    make(tmp_path / "packed/index.json", tmp_path / "protocol.txt", tmp_path / "x.bin")
    found = locate_benchmark(tmp_path / "packed", pairs=tmp_path / "protocol.txt")
    assert found.kind == "packed" and found.pairs == tmp_path / "protocol.txt"
    with pytest.raises(UsageError, match="no such file"):
        locate_benchmark(tmp_path / "packed", pairs=tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="its own pairs"):
        locate_benchmark(tmp_path / "x.bin", pairs=tmp_path / "protocol.txt")


def test_what_is_no_benchmark_is_explained(tmp_path):
    make(tmp_path / "empty/notes.md", tmp_path / "packs/agedb_30.bin", tmp_path / "packed/index.json")
    make(tmp_path / "bare/pairs.txt", tmp_path / "file.zip")
    for target, found in [
        (tmp_path / "empty", "it has no pairs.txt"),
        (tmp_path / "packs", "agedb_30.bin; name one"),
        (tmp_path / "packed", "without pairs.txt"),
        (tmp_path / "bare", "no identity folders"),
        (tmp_path / "file.zip", "verification pack"),
        (tmp_path / "absent", "no such file or folder"),
        ("./absent.bin", "no such file or folder"),
    ]:
        with pytest.raises(UsageError, match=found) as stop:
            locate_benchmark(target)
        assert "FOLDER/images/NAME/NAME_0001.jpg" in str(stop.value)


def test_data_must_be_a_folder(tmp_path):
    make(tmp_path / "agedb_30.bin")
    with pytest.raises(UsageError, match="does not exist"):
        locate_benchmark("lfw", data=tmp_path / "absent")
    with pytest.raises(UsageError, match="name the file itself"):
        locate_benchmark("agedb30", data=tmp_path / "agedb_30.bin")


def test_cache_root(tmp_path, monkeypatch, empty_places):
    assert cache_root() == empty_places / ".cache/lrface"
    monkeypatch.setenv("LRFACE_CACHE", str(tmp_path / "cache"))
    assert cache_root() == tmp_path / "cache"
    assert cache_root(tmp_path / "own") == tmp_path / "own"


def test_shared_data_as_root(shared, monkeypatch):
    monkeypatch.setenv("LRFACE_DATA", str(shared / "data"))
    found = locate_benchmark("lfw")
    assert found.kind == "folder" and found.path == shared / "data/lfw/images"
    assert found.pairs == shared / "data/lfw/pairs.txt"
