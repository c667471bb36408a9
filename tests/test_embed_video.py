"""Videos made by OpenCV of the photograph that insightface ships: faces frame by frame, and what goes wrong."""

import json
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_embed import faces_photo, read_parquet, tiny  # noqa: F401 (fixtures)
from typer.testing import CliRunner

from lrface import load_embedder
from lrface.cli import app
from lrface.embed import Frame, are_videos, embed_videos, is_video
from lrface.embed.video import frames
from lrface.errors import LrfaceError, UsageError

FRAMES, RATE = 6, 10


@pytest.fixture(scope="module")
def scene(faces_photo) -> np.ndarray:  # noqa: F811
    """One face of the photograph with what is around it, uint8 [120, 120, 3] RGB."""
    image = cv2.imread(str(faces_photo))[:, :, ::-1]
    image = cv2.resize(image, (640, 443), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(image[60:180, 100:220])


@pytest.fixture(scope="module")
def video(scene, tmp_path_factory) -> Path:
    """Six frames at 10 a second: the face in the even ones, grey in the odd ones."""
    return write_video(tmp_path_factory.mktemp("video") / "door.avi", scene)


def write_video(path, scene, count=FRAMES):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), RATE, scene.shape[1::-1])
    assert writer.isOpened()
    for number in range(count):
        picture = scene[:, :, ::-1] if number % 2 == 0 else np.full_like(scene, 90)
        writer.write(np.ascontiguousarray(picture))
    writer.release()
    return path


def test_frames_have_numbers_times_and_rgb(video, scene):
    found = list(frames(video))
    assert [number for number, _, _ in found] == list(range(FRAMES))
    np.testing.assert_allclose([seconds for _, seconds, _ in found], np.arange(FRAMES) / RATE, atol=0.02)
    assert all(image.dtype == np.uint8 and image.shape == scene.shape for _, _, image in found)
    assert (
        np.abs(found[0][2].astype(int) - scene).mean() < 8
    )  # the codec loses a little; swapped colours lose 20
    assert np.abs(found[0][2][:, :, ::-1].astype(int) - scene).mean() > 8
    assert [number for number, _, _ in frames(video, 4)] == [0, 4]


def test_a_video_is_read_as_it_is_asked_for(video, monkeypatch):
    grabbed = []
    original = cv2.VideoCapture

    class Counting:
        def __init__(self, *arguments):
            self._capture = original(*arguments)

        def grab(self):
            grabbed.append(1)
            return self._capture.grab()

        def __getattr__(self, name):
            return getattr(self._capture, name)

    monkeypatch.setattr(cv2, "VideoCapture", Counting)
    reading = frames(video)
    for wanted in (1, 2, 3):
        next(reading)
        assert len(grabbed) == wanted  # nothing is read ahead
    reading.close()


def test_faces_of_a_video(tiny, video, scene):  # noqa: F811
    found = list(tiny.embed_video(video, batch_size=4))
    assert [type(frame) for frame in found] == [Frame] * FRAMES
    assert [(frame.frame, len(frame.faces)) for frame in found] == [(n, 1 - n % 2) for n in range(FRAMES)]
    assert found[1].faces.failures[0][1].startswith("no face found") and found[0].faces.failures == []
    _, _, image = next(iter(frames(video)))
    alone = tiny.embed_photo(image)
    np.testing.assert_allclose(found[0].faces.vectors, alone.vectors, atol=1e-3)
    np.testing.assert_allclose(found[0].faces.box, alone.box, atol=0.1)
    some = list(tiny.embed_video(str(video), every=2, limit=2, batch_size=1))
    assert [(frame.frame, len(frame.faces)) for frame in some] == [(0, 1), (2, 1)]
    assert some[1].faces.source.tolist() == [0] and some[1].seconds == pytest.approx(0.2, abs=0.02)
    for options, says in (
        ({"every": 0}, "every must be"),
        ({"limit": 0}, "limit must be"),
        ({"faces": "x"}, "faces"),
    ):
        with pytest.raises(UsageError, match=says):
            next(tiny.embed_video(video, **options))


def test_videos_that_cannot_be_read_are_named(tiny, video, tmp_path):  # noqa: F811
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    cut = tmp_path / "cut.avi"
    cut.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    for source, says in (
        (tmp_path / "absent.mp4", r"absent\.mp4: no such video file"),
        (text, r"text\.mp4 is no video"),
        (97, "camera 97 cannot be opened"),
        ("rtsp://127.0.0.1:9/none", "rtsp://127.0.0.1:9/none cannot be opened"),
    ):
        with pytest.raises(LrfaceError, match=says):
            list(tiny.embed_video(source))
    given = []
    with pytest.raises(LrfaceError, match=r"cut\.avi"):
        for frame in tiny.embed_video(cut, batch_size=2):
            given.append(frame.frame)
    assert given == list(range(len(given))) and 0 < len(given) < FRAMES  # what came before is not lost


def test_a_stream_that_ends_broke_off(tiny, video):  # noqa: F811
    """Over HTTP, from a server of the test's own."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(video.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    given = []
    try:
        with pytest.raises(LrfaceError, match=f"broke off after {FRAMES} frames"):
            for frame in tiny.embed_video(f"http://127.0.0.1:{server.server_port}/{video.name}", every=2):
                given.append((frame.frame, len(frame.faces)))
    finally:
        server.shutdown()
        server.server_close()
    assert given == [(0, 1), (2, 1), (4, 1)]


def test_videos_into_one_file(tiny, video, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("lrface.embed.paths._PART_IMAGES", 2)
    out = tmp_path / "out" / "v.parquet"
    summary = embed_videos(tiny, [video, tmp_path / "absent.mp4"], out, progress=False)
    assert (summary.images, summary.embedded, summary.faces, summary.failures) == (FRAMES, 3, 3, 1)
    columns, _ = read_parquet(out)
    assert (
        columns["path"] == [str(video)] * 3 and columns["frame"] == [0, 2, 4] and columns["face"] == [0] * 3
    )
    np.testing.assert_allclose(columns["seconds"], [0, 0.2, 0.4], atol=0.02)
    assert "absent.mp4" in summary.failures_file.read_text()
    assert sorted(path.name for path in out.parent.iterdir()) == ["v.parquet", "v.parquet.failures.csv"]
    embed_videos(tiny, [video], tmp_path / "v.npz", every=2, limit=2, progress=False)
    with np.load(tmp_path / "v.npz", allow_pickle=False) as arrays:
        assert arrays["frame"].tolist() == [0, 2] and arrays["vector"].shape == (2, tiny.embedding_size)
    with pytest.raises(LrfaceError, match="none of 0 frames .* gave a face"):
        embed_videos(tiny, [tmp_path / "absent.mp4"], tmp_path / "none.parquet", progress=False)
    assert not (tmp_path / "none.parquet").exists()


def test_names_of_videos(tmp_path):
    assert is_video("rtsp://door/1") and is_video("0") and is_video("a/B.MP4") and not is_video("a.jpg")
    (tmp_path / "7").mkdir()
    assert not is_video(tmp_path / "7")
    assert are_videos(["a.mp4", "0"]) and not are_videos(["a.jpg", "folder"])
    with pytest.raises(UsageError, match=r"a\.mp4 is a video and b\.jpg is none"):
        are_videos(["b.jpg", "a.mp4"])


def test_the_command_takes_videos(tiny, video, tmp_path):  # noqa: F811
    arguments = [
        "embed",
        str(video),
        "--model",
        str(tiny.file),
        "--out",
        str(tmp_path / "v.parquet"),
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(app, [*arguments, "--every", "2", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["images"], found["faces"], found["unit"], found["source"]) == (3, 3, "frames", "videos")
    mixed = CliRunner().invoke(app, [*arguments, "--every", "2", str(tmp_path)])
    assert mixed.exit_code == 2 and "in two calls" in mixed.stderr


def test_photographs_and_videos_from_several_threads(tiny, video, scene):  # noqa: F811
    embedder = load_embedder(tiny.file, threads=1)  # its detector is not loaded yet: threads meet there too
    wanted = tiny.embed_photo(scene).vectors
    results: dict[int, list[np.ndarray]] = {}

    def work(number: int) -> None:
        photograph = embedder.embed([scene, scene[:, ::-1]], faces="all").vectors[:1]
        film = [frame.faces.vectors for frame in embedder.embed_video(video, every=4)]
        results[number] = [photograph, *film]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1, 2, 3]
    for result in results.values():
        np.testing.assert_allclose(result[0], wanted, atol=1e-3)
        assert len(result) == 3
        np.testing.assert_allclose(result[1], result[2], atol=1e-3)
        np.testing.assert_allclose(result[1], results[0][1], atol=1e-5)
