"""Folders of photographs to packed faces: every file accounted for, and the same bytes whatever happens."""

import csv
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import lrface.files
from lrface.align import pipeline
from lrface.align.detect import choose_faces
from lrface.align.mtcnn import MtcnnDetector
from lrface.align.pipeline import align_folder
from lrface.align.warp import TEMPLATE_112, similarity_transform, warp_face
from lrface.data.packed import PackedSource, verify_shards
from lrface.data.source import check_source
from lrface.errors import LrfaceError, UsageError

COPIES = 8


def save(path: Path, image: np.ndarray, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


@pytest.fixture(scope="module")
def people(tmp_path_factory, face_cuts):
    """Six people with eight photographs each: 48 files, which makes three parts."""
    root = tmp_path_factory.mktemp("people")
    for number, cut in enumerate(face_cuts):
        for copy in range(COPIES):
            shifted = cv2.copyMakeBorder(cut, 0, 0, copy, 0, cv2.BORDER_REPLICATE)
            save(root / f"person{number}" / f"{copy}.jpg", shifted, quality=95)
    return root


def align(src, out, **settings):
    return align_folder(src, out, **{"workers": 1, "show_progress": False} | settings)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))}


def report(out: Path) -> dict[str, tuple[str, str, str]]:
    with open(out / "report.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["source", "status", "reason", "faces"]
    found = {row[0]: tuple(row[1:]) for row in rows[1:]}
    assert len(found) == len(rows) - 1
    return found


@pytest.fixture(scope="module")
def undisturbed(people, tmp_path_factory):
    """What an undisturbed run with one process writes."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    align(people, out)
    return content(out)


def test_what_is_written(people, tmp_path, face_cuts):
    out = tmp_path / "out"
    summary = align(people, out)
    assert (summary.files, summary.photographs, summary.aligned, summary.faces) == (48, 48, 48, 48)
    assert (summary.no_face, summary.unreadable, summary.not_an_image, summary.reused) == (0, 0, 0, 0)
    assert summary.identities == 6 and summary.images_per_second > 0
    assert json.loads(json.dumps(summary.to_dict()))["faces"] == 48
    assert "48 faces of 6 identities" in str(summary)
    assert sorted(content(out)) == ["index.json", "report.csv", "shard-00000.arrow"]

    source = PackedSource(out)
    check_source(source, "packed")
    verify_shards(out)
    assert source.identities == [f"person{number}" for number in range(6)]
    assert source.labels.tolist() == np.repeat(np.arange(6), COPIES).tolist()
    assert source.sources() == [f"person{number}/{copy}.jpg" for number in range(6) for copy in range(COPIES)]
    assert (source.column("score") > 0.9).all() and (source.column("face") == 0).all()
    assert report(out)["person3/5.jpg"] == ("aligned", "", "1")
    for i in (0, 13, 40):
        photo = cv2.cvtColor(cv2.imread(str(people / source.sources()[i])), cv2.COLOR_BGR2RGB)
        landmarks = source.column("landmarks")[i]
        matrix = similarity_transform(landmarks)
        # landmarks are in the photograph's pixels and land on the template
        assert np.abs(landmarks @ matrix[:, :2].T + matrix[:, 2] - TEMPLATE_112).mean() < 4
        crop = warp_face(photo, landmarks)
        assert source.image(i).shape == (112, 112, 3)
        assert np.abs(source.image(i).astype(int) - crop).mean() < 2  # JPEG of it


def test_finished_work_is_not_done_again(people, tmp_path, monkeypatch):
    out = tmp_path / "out"
    align(people, out)
    before = content(out)
    monkeypatch.setattr(pipeline, "_run_parts", None)  # would fail if called
    summary = align(people, out)
    assert summary.reused == summary.files == 48 and summary.faces == 48
    assert content(out) == before


def test_processes_write_the_same_bytes(people, tmp_path, undisturbed):
    # Threads and arithmetic in this process before: forked workers must not mind.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.randn(300, 300) @ torch.randn(300, 300)
    cv2.setNumThreads(2)
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (9, 9), 2)
    try:
        align(people, tmp_path / "out", workers=2)
        assert torch.get_num_threads() == 2 and cv2.getNumThreads() == 2
    finally:
        torch.set_num_threads(threads)
    assert content(tmp_path / "out") == undisturbed
    assert multiprocessing.active_children() == []


def test_spawned_processes_write_the_same_bytes(people, tmp_path, undisturbed, monkeypatch):
    """What happens where processes cannot be forked, and on a GPU."""
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    align(people, tmp_path / "out", workers=2)
    assert content(tmp_path / "out") == undisturbed


@pytest.fixture(scope="module")
def trouble(tmp_path_factory, six_faces, face_cuts):
    """Three identities among everything that goes wrong; file -> (status, start of the reason, faces)."""
    root = tmp_path_factory.mktemp("trouble") / "src"
    cut = face_cuts[0]
    expected = {}

    def put(name, image=cut, status="aligned", reason="", faces="1", **options):
        save(root / name, image, **options)
        expected[name] = (status, reason, faces)

    def write(name, data, status, reason):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        expected[name] = (status, reason, "0")

    grey = np.full((200, 200, 3), 127, np.uint8)
    put("anna/good.jpg")
    put("anna/deep/er/good.png")
    put("anna/nothing.jpg", grey, "no_face", "no face found", "0")
    put("anna/capital.JPG")
    put("anna/good without suffix", format="PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    put("anna/turned.jpg", np.rot90(cut, 1), exif=exif)
    put("anna/small.png", cv2.resize(cut, (48, 48), interpolation=cv2.INTER_AREA))
    put("anna/many.jpg", six_faces)
    data = (root / "anna/good.jpg").read_bytes()
    write("anna/truncated.jpg", data[: len(data) // 2], "unreadable", "truncated")
    write("anna/empty.jpg", b"", "unreadable", "empty file")
    write("anna/text.jpg", b"hello", "unreadable", "damaged")
    write("anna/notes, with a comma.txt", b"hello", "not_an_image", "no known image format")
    write("anna/.DS_Store", b"\0\0\0\1Bud1" + bytes(50), "not_an_image", "no known image format")
    write("anna/Thumbs.db", b"\xd0\xcf\x11\xe0" + bytes(50), "not_an_image", "no known image format")
    write("anna/film.mp4", b"\0\0\0\x18ftypmp42" + bytes(50), "not_an_image", "no known image format")
    # an identity without a single face, sorted first: it must not leave a gap in the labels
    put("aaron/nothing.png", grey, "no_face", "no face found", "0")
    put("Ürsel/grey.png", cv2.cvtColor(cut, cv2.COLOR_RGB2GRAY))
    put("Ürsel/sixteen.png", cv2.cvtColor(cut, cv2.COLOR_RGB2GRAY).astype(np.uint16) * 257)
    Image.fromarray(cut).convert("CMYK").save(root / "Ürsel/cmyk.jpg")
    expected["Ürsel/cmyk.jpg"] = ("aligned", "", "1")
    frames = [Image.fromarray(cut), Image.fromarray(np.full_like(cut, 127))]
    frames[0].save(root / "Ürsel/animated.webp", save_all=True, append_images=frames[1:])
    expected["Ürsel/animated.webp"] = ("aligned", "", "1")
    save(root / "Ürsel/folder.jpg/inside.jpg", cut)
    expected["Ürsel/folder.jpg"] = ("not_an_image", "a folder, not a file", "0")
    expected["Ürsel/folder.jpg/inside.jpg"] = ("aligned", "", "1")
    os.mkfifo(root / "Ürsel/pipe.jpg")
    expected["Ürsel/pipe.jpg"] = ("not_an_image", "not a regular file", "0")
    (root / "Ürsel/broken link.jpg").symlink_to("gone.jpg")
    expected["Ürsel/broken link.jpg"] = ("unreadable", "link to a file that does not exist", "0")
    (root / "Ürsel/link.jpg").symlink_to(root / "anna/good.jpg")
    expected["Ürsel/link.jpg"] = ("aligned", "", "1")
    (root / "Ürsel/up").symlink_to(root)
    expected["Ürsel/up"] = ("not_an_image", "link to a folder above it", "0")
    save(root / "anna/.hidden/good.jpg", cut)
    expected["anna/.hidden"] = ("not_an_image", "hidden folder", "0")
    name = os.fsdecode(b"anna/b\xe9b\xe9.jpg")  # no valid UTF-8
    save(root / name, cut)
    expected["anna/b\\udce9b\\udce9.jpg"] = ("aligned", "", "1")
    elsewhere = root.parent / "elsewhere"
    save(elsewhere / "good.jpg", cut)
    (root / "zoe").symlink_to(elsewhere)
    expected["zoe/good.jpg"] = ("aligned", "", "1")
    put("stray.jpg", cut, "no_identity", "lies directly in the source", "0")
    write("readme.txt", b"hello", "not_an_image", "no known image format")
    return root, expected


def test_every_file_is_accounted_for(trouble, tmp_path):
    root, expected = trouble
    summary = align(root, tmp_path / "out")
    found = report(tmp_path / "out")
    assert sorted(found) == sorted(expected)
    for name, (status, reason, faces) in expected.items():
        assert (found[name][0], found[name][2]) == (status, faces), (name, found[name])
        assert found[name][1].startswith(reason) and bool(reason) == bool(found[name][1]), (name, found[name])
    count = {status: sum(row[0] == status for row in expected.values()) for status in pipeline.STATUSES}
    assert summary.files == len(expected) == sum(count.values())
    for status, number in count.items():
        assert getattr(summary, status) == number
    source = PackedSource(tmp_path / "out")
    check_source(source, "packed")
    assert source.identities == ["anna", "zoe", "Ürsel"]  # by code point, without aaron
    rows = dict(zip(source.sources(), range(len(source)), strict=True))
    assert source.labels[rows["zoe/good.jpg"]] == 1
    landmarks = source.column("landmarks")
    # The rotated photograph shows the same face, in its upright pixels; the small one in its own.
    upright, turned, small = (
        landmarks[rows[f"anna/{name}"]] for name in ("good.jpg", "turned.jpg", "small.png")
    )
    assert np.abs(upright - turned).max() < 2
    cut = read_size(root / "anna/good.jpg")
    assert np.abs(small * (cut[0] / 48, cut[1] / 48) - upright).mean() < 0.06 * cut[0]


def test_a_folder_that_cannot_be_listed(people, tmp_path, monkeypatch):
    scandir = os.scandir

    def refused(folder):
        if isinstance(folder, str) and folder.endswith("person2"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(pipeline.os, "scandir", refused)
    summary = align(people, tmp_path / "out")
    assert (summary.aligned, summary.unreadable, summary.identities) == (40, 1, 5)
    reason = "folder cannot be listed: Permission denied"
    assert report(tmp_path / "out")["person2"] == ("unreadable", reason, "0")


def test_landmarks_that_no_crop_can_be_made_from(people, tmp_path, monkeypatch):
    warp = pipeline.warp_face
    calls = 0

    def first_fails(*arguments):
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ValueError("landmarks coincide")
        return warp(*arguments)

    monkeypatch.setattr(pipeline, "warp_face", first_fails)
    summary = align(people, tmp_path / "out")
    assert (summary.aligned, summary.no_face) == (47, 1)
    found = report(tmp_path / "out")["person0/0.jpg"]
    assert found == ("no_face", "a face cannot be aligned: landmarks coincide", "0")


def test_photographs_without_a_face_give_their_middle(people, tmp_path):
    """With fallback center: told apart by status, score and counts; with skip they are left out."""
    src = tmp_path / "src"
    grey = np.full((60, 100, 3), 127, np.uint8)
    grey[:, 20:80] = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    save(src / "anna/nothing.png", grey)
    save(src / "bob/nothing.png", grey.swapaxes(0, 1).copy())
    (src / "bob/0.jpg").symlink_to(people / "person0/0.jpg")
    (src / "bob/broken.jpg").write_bytes(b"no photograph")
    summary = align(src, tmp_path / "out", fallback="center", image_format="png")
    assert (summary.aligned, summary.fallback, summary.no_face, summary.unreadable) == (1, 2, 0, 1)
    assert summary.faces == 3 and summary.photographs == 4
    assert "2 without a face, given by their middle" in str(summary)
    rows = report(tmp_path / "out")
    assert rows["anna/nothing.png"] == ("fallback", "no face found; the middle was taken", "1")
    assert rows["bob/0.jpg"][0] == "aligned"
    source = PackedSource(tmp_path / "out")
    check_source(source, "packed")
    assert source.identities == ["anna", "bob"]
    assert source.index["align"]["counts"]["fallback"] == 2
    score = dict(zip(source.sources(), source.column("score"), strict=True))
    assert score["anna/nothing.png"] == score["bob/nothing.png"] == 0 and score["bob/0.jpg"] > 0.9
    assert source.column("box")[0].tolist() == [20, 0, 80, 60]
    np.testing.assert_array_equal(source.image(0), warp_face(grey, source.column("landmarks")[0]))
    with pytest.raises(UsageError, match="begun with fallback 'center', now it is 'skip'"):
        align(src, tmp_path / "out", image_format="png")
    summary = align(src, tmp_path / "skipped")
    assert (summary.aligned, summary.fallback, summary.no_face, summary.identities) == (1, 0, 2, 1)


def test_large_photographs_are_read_small_where_faces_stay_large(tmp_path, six_faces, monkeypatch):
    """A JPEG of three times the size: large faces are cut from the reduced copy, small ones from the whole; landmarks
    are in pixels of the whole."""
    huge = cv2.resize(six_faces, None, fx=3.5, fy=3.5, interpolation=cv2.INTER_LINEAR)
    assert max(huge.shape) > 2 * pipeline.MAX_SIDE
    save(tmp_path / "src/group/six.jpg", huge, quality=95)
    wholes = []
    read = pipeline.read_photo
    monkeypatch.setattr(pipeline, "read_photo", lambda path: wholes.append(path) or read(path))
    align(tmp_path / "src", tmp_path / "out", face_rule="all", image_format="png")
    assert wholes == []  # faces are more than 112 pixels in the copy
    align(tmp_path / "src", tmp_path / "large", face_rule="all", image_format="png", image_size=448)
    assert len(wholes) == 1
    source, large = PackedSource(tmp_path / "out"), PackedSource(tmp_path / "large")
    assert len(source) == len(large) == 6
    np.testing.assert_array_equal(source.column("landmarks"), large.column("landmarks"))
    # The copy that is searched is shrunk by the decoder first: landmarks differ by a fraction of its pixels.
    expected = choose_faces(MtcnnDetector().detect([huge])[0], huge.shape, "all")
    apart = np.stack([face.landmarks for face in expected]) - source.column("landmarks")
    assert np.abs(apart).mean() < 0.7 * max(huge.shape) / pipeline.MAX_SIDE
    for i in range(6):
        # Whole, reduced or shrunk by the warp: the same crop but for resampling.
        crop = warp_face(huge, source.column("landmarks")[i])
        assert np.abs(source.image(i).astype(int) - crop).mean() < 4
        crop = warp_face(huge, source.column("landmarks")[i], 448)
        assert np.abs(large.image(i).astype(int) - crop).mean() < 4


def read_size(path):
    with Image.open(path) as image:
        return image.size


def test_all_faces_of_a_photograph(tmp_path, six_faces, six_faces_path):
    (tmp_path / "src/group").mkdir(parents=True)
    (tmp_path / "src/group/six.jpg").write_bytes(six_faces_path.read_bytes())
    summary = align(tmp_path / "src", tmp_path / "out", face_rule="all", image_format="png", image_size=64)
    assert summary.faces == 6 and summary.photographs == 1
    source = PackedSource(tmp_path / "out")
    assert source.column("face").tolist() == list(range(6))
    assert source.labels.tolist() == [0] * 6
    assert report(tmp_path / "out")["group/six.jpg"] == ("aligned", "", "6")
    boxes = source.column("box")
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert (np.diff(areas) <= 0).all()
    for i in range(6):  # PNG keeps every pixel
        np.testing.assert_array_equal(
            source.image(i), warp_face(six_faces, source.column("landmarks")[i], 64)
        )
    align(tmp_path / "src", tmp_path / "one", face_rule="largest")
    assert np.array_equal(PackedSource(tmp_path / "one").column("box"), boxes[:1])


def test_shards_keep_the_order(people, tmp_path):
    align(people, tmp_path / "out", shard_size=16)
    source = PackedSource(tmp_path / "out")
    assert [shard["rows"] for shard in source.index["shards"]] == [16, 16, 16]
    assert source.sources() == sorted(source.sources())
    assert source.labels.tolist() == np.repeat(np.arange(6), COPIES).tolist()


def in_fork(work) -> int:
    """Run ``work`` in a forked process; its exit code, negative when a signal ended it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_file(src: Path, out: Path, number: int, moment: str) -> bool:
    """Align in a forked process that is killed before or after it renames its file ``number``; false if it wrote
    fewer files and finished."""
    replace = os.replace
    written = 0

    def counted(source, target):
        nonlocal written
        written += 1
        if moment == "after":
            replace(source, target)
        if written == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == "before":
            replace(source, target)

    def run():
        lrface.files.os.replace = counted
        align(src, out)

    code = in_fork(run)
    assert code in (0, -signal.SIGKILL)
    return code != 0


# job.json, three parts, report.csv, plan.json, one shard, index.json
FILES_WRITTEN = 8


@pytest.mark.parametrize("number", range(1, FILES_WRITTEN + 1))
def test_killed_while_writing_a_file(people, tmp_path, undisturbed, number):
    """Killed with a file half-way, the same call leaves nothing half and ends with the same bytes."""
    out = tmp_path / "out"
    assert killed_at_file(people, out, number, "before")
    assert any(name.endswith(".tmp") for name in content_names(out))
    assert not (out / "index.json").exists()
    align(people, out)
    assert content(out) == undisturbed


def test_killed_again_and_again(people, tmp_path, undisturbed):
    """Killed after every second file that it writes, the job still ends, and no file is made twice."""
    out = tmp_path / "out"
    kills = 0
    while killed_at_file(people, out, 2, "after"):
        kills += 1
        assert kills <= FILES_WRITTEN
    assert kills == FILES_WRITTEN // 2
    assert content(out) == undisturbed


def test_a_killed_worker_ends_the_job_and_it_goes_on(people, tmp_path, undisturbed, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        part = pipeline._Aligner.part

        def killed(self, files, path):
            if path.name == "part-000001.arrow":
                os.kill(os.getpid(), signal.SIGKILL)
            return part(self, files, path)

        patch.setattr(pipeline._Aligner, "part", killed)
        with pytest.raises(LrfaceError, match="stopped by SIGKILL.*out of memory.*fewer workers"):
            align(people, out, workers=2)
    assert multiprocessing.active_children() == []
    assert not (out / "index.json").exists()
    align(people, out, workers=2)
    assert content(out) == undisturbed


def test_an_error_in_a_worker_is_reported(people, tmp_path, undisturbed, monkeypatch, capfd):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:

        def full(source, target):
            if Path(target).name.startswith("part-"):
                raise OSError(28, "No space left on device")
            os.rename(source, target)

        patch.setattr(lrface.files.os, "replace", full)
        with pytest.raises(LrfaceError, match="part-00000.*the disk is full"):
            align(people, out, workers=2)
        with pytest.raises(LrfaceError, match="part-000000.*the disk is full"):
            align(people, out, workers=1)
    assert "Traceback" not in capfd.readouterr().err
    assert [name for name in content_names(out) if name.endswith(".tmp")] == []
    align(people, out)
    assert content(out) == undisturbed


def content_names(folder):
    return [path.name for path in folder.rglob("*")]


def test_ctrl_c_stops_the_workers(people, tmp_path, undisturbed, monkeypatch, capfd):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        advance = pipeline.Counter.update

        def pressed(self, *values):
            advance(self, *values)
            if self.get("aligned") and multiprocessing.active_children():
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGINT)  # a terminal sends it to every process
                raise KeyboardInterrupt

        patch.setattr(pipeline.Counter, "update", pressed)
        with pytest.raises(KeyboardInterrupt):
            align(people, out, workers=2)
    assert multiprocessing.active_children() == []
    assert "Traceback" not in capfd.readouterr().err
    align(people, out, workers=2)
    assert content(out) == undisturbed


def test_workers_end_with_their_parent(people, tmp_path, undisturbed):
    """Kill -9 of the parent alone: its workers go, the lock goes with them, the next run completes."""
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        os.setsid()
        align(people, out, workers=2)
        os._exit(0)
    deadline = time.monotonic() + 60
    while not list((out / "unfinished").glob("part-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while session_is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not session_is_alive(child)
    align(people, out)
    assert content(out) == undisturbed


def session_is_alive(session: int) -> bool:
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return True
    return False


def test_two_runs_on_one_folder(people, tmp_path):
    (tmp_path / "out/unfinished").mkdir(parents=True)
    with pipeline._locked(tmp_path / "out/unfinished"):
        with pytest.raises(LrfaceError, match="another run is working on it"):
            align(people, tmp_path / "out")


def test_a_damaged_part_is_made_again(people, tmp_path, undisturbed, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_plan", lambda *_: (_ for _ in ()).throw(LrfaceError("stopped")))
        with pytest.raises(LrfaceError, match="stopped"):
            align(people, out)
    (out / "unfinished/part-000001.arrow").write_bytes(b"ARROW1 and then nothing")
    summary = align(people, out)
    assert summary.reused == 32
    assert content(out) == undisturbed


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_or_photographs(people, tmp_path, monkeypatch, finished):
    out = tmp_path / "out"
    if finished:
        align(people, out)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "_run_parts", lambda *_: (_ for _ in ()).throw(LrfaceError("stopped")))
            with pytest.raises(LrfaceError, match="stopped"):
                align(people, out)
    before = content_names(out)
    with pytest.raises(UsageError, match="begun with image_size 112, now it is 128.*another folder"):
        align(people, out, image_size=128)
    with pytest.raises(UsageError, match="begun with face_rule 'largest-central', now it is 'all'"):
        align(people, out, face_rule="all")
    other = tmp_path / "other"
    save(other / "person0/0.jpg", np.zeros((30, 30, 3), np.uint8))
    with pytest.raises(UsageError, match="other photographs: 48 files then, 1 now"):
        align(other, out)
    assert content_names(out) == before


def test_no_face_at_all(tmp_path):
    save(tmp_path / "src/anna/grey.png", np.full((100, 100, 3), 99, np.uint8))
    for _ in range(2):
        with pytest.raises(
            LrfaceError, match="no face was found in any of 1 files \\(1 no_face\\).*report.csv"
        ):
            align(tmp_path / "src", tmp_path / "out")
    assert report(tmp_path / "out") == {"anna/grey.png": ("no_face", "no face found", "0")}


def test_wrong_places(people, tmp_path):
    with pytest.raises(UsageError, match="nowhere does not exist"):
        align(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is not a folder"):
        align(tmp_path / "file", tmp_path / "out")
    with pytest.raises(UsageError, match="is a file"):
        align(people, tmp_path / "file")
    with pytest.raises(UsageError, match="lies in"):
        align(people, people / "out")
    with pytest.raises(UsageError, match="not empty and not from `lrface align` \\(it holds file\\)"):
        align(people, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no files found"):
        align(tmp_path / "empty", tmp_path / "out")
    save(tmp_path / "flat/a.jpg", np.zeros((30, 30, 3), np.uint8))
    with pytest.raises(UsageError, match="photographs lie directly in it.*PERSON/a.jpg"):
        align(tmp_path / "flat", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 4}, "image size"),
        ({"face_rule": "best"}, "'best'; there are largest-central, largest, all"),
        ({"image_format": "gif"}, "'gif'"),
        ({"quality": 0}, "quality"),
        ({"min_score": 1.0}, "min_score"),
        ({"min_face_size": 3}, "min_face_size"),
        ({"shard_size": 0}, "shard_size"),
        ({"workers": 0}, "workers"),
        ({"device": "toaster"}, "'toaster'"),
        ({"fallback": "grey"}, "'grey'; there are skip, center"),
        ({"engine": "spark"}, "'spark'; there are local, ray"),
        ({"address": "auto"}, "give engine ray"),
    ],
)
def test_arguments_are_checked(people, tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        align(people, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_packed_data_of_others_is_left_alone(people, tmp_path):
    from lrface.data.packed import write_index

    write_index(tmp_path, image_size=(112, 112), identities=[], shards=[])
    with pytest.raises(UsageError, match="`lrface align` did not make"):
        align(people, tmp_path)
    assert content_names(tmp_path) == ["index.json"]


def test_progress_goes_to_standard_error(people, tmp_path, capsys):
    align(people, tmp_path / "out", show_progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "align" in captured.err and "faces=48" in captured.err and "images/s" in captured.err


def test_lfw_photographs_are_all_aligned(shared, tmp_path):
    """A few of the real ones, through links as the benchmark does it."""
    for path in sorted((shared / "data/lfw/images").glob("*/*.jpg"))[::700]:
        (tmp_path / "src" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / path.parent.name / path.name).symlink_to(path)
    summary = align(tmp_path / "src", tmp_path / "out")
    assert summary.aligned == summary.files == 19
    # LFW faces are upright and central; crops show their eyes where the template has them.
    source = PackedSource(tmp_path / "out")
    middle = source.column("landmarks").mean(axis=(0, 1))
    assert np.abs(middle - 125).max() < 12
