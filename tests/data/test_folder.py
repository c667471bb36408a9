from pathlib import Path

import cv2
import numpy as np
import pytest

from lrface.data.folder import FolderSource
from lrface.data.source import FaceSource, check_source, open_source
from lrface.errors import LrfaceError


def write(path: Path, colour: tuple[int, int, int] = (255, 0, 0), side: int = 16) -> Path:
    """A picture of one RGB colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((side, side, 3), colour, dtype=np.uint8)
    assert cv2.imwrite(str(path), image[..., ::-1])
    return path


class Listed:
    """A source that says what it is told to say."""

    def __init__(self, identities: list[str], labels: list[int]):
        self.identities = identities
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> np.ndarray:
        return np.zeros((8, 8, 3), dtype=np.uint8)


def test_identities_are_folders_in_order_of_their_names(tmp_path):
    write(tmp_path / "b" / "2.png")
    write(tmp_path / "b" / "1.jpg")
    write(tmp_path / "a" / "deep" / "x.PNG")
    write(tmp_path / "c" / "x.bmp")
    source = open_source(tmp_path)
    assert isinstance(source, FolderSource) and isinstance(source, FaceSource)
    assert source.identities == ["a", "b", "c"]
    assert source.labels.tolist() == [0, 1, 1, 2] and source.labels.dtype == np.int64
    assert [path.name for path in source.paths] == ["x.PNG", "1.jpg", "2.png", "x.bmp"]
    assert len(source) == 4
    check_source(source, "faces")


def test_colours_are_rgb(tmp_path):
    write(tmp_path / "a" / "1.png", (250, 120, 10))
    image = FolderSource(tmp_path).image(0)
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    assert image[3, 3].tolist() == [250, 120, 10]


def test_grey_images_get_three_channels(tmp_path):
    (tmp_path / "a").mkdir()
    cv2.imwrite(str(tmp_path / "a" / "1.png"), np.full((9, 7), 77, dtype=np.uint8))
    image = FolderSource(tmp_path).image(0)
    assert image.shape == (9, 7, 3) and (image == 77).all()


def test_what_is_no_image_is_passed_over(tmp_path):
    write(tmp_path / "a" / "1.png")
    write(tmp_path / "a" / ".hidden.png")
    write(tmp_path / ".cache" / "1.png")
    write(tmp_path / "loose.png")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / "folder.png").mkdir()
    (tmp_path / "empty").mkdir()
    write(tmp_path / "b" / "1.png")
    source = FolderSource(tmp_path)
    assert source.identities == ["a", "b"]  # "empty" leaves no gap in the labels
    assert source.labels.tolist() == [0, 1]


def test_an_empty_folder_says_what_was_expected(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(LrfaceError, match="no images found; expected .*/IDENTITY/IMAGE.jpg .*lrface align"):
        open_source(tmp_path)


@pytest.mark.parametrize("content", [b"", b"this is no image", b"\xff\xd8\xff\xe0 cut short"])
def test_a_broken_image_is_named(tmp_path, content):
    write(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.jpg").write_bytes(content)
    source = FolderSource(tmp_path)
    source.image(0)
    with pytest.raises(LrfaceError, match="a/2.jpg is not a readable image: .*Remove it or copy it again"):
        source.image(1)


def test_names_beyond_ascii(tmp_path):
    (tmp_path / "Zoë Müller").mkdir()
    ok, data = cv2.imencode(".png", np.full((4, 4, 3), 9, dtype=np.uint8))
    assert ok
    (tmp_path / "Zoë Müller" / "写真.png").write_bytes(data.tobytes())
    source = FolderSource(tmp_path)
    assert source.identities == ["Zoë Müller"] and (source.image(0) == 9).all()


def test_a_path_that_is_nothing_or_a_file_is_named(tmp_path):
    with pytest.raises(LrfaceError, match="nowhere: no such file or directory"):
        open_source(tmp_path / "nowhere")
    path = write(tmp_path / "face.png")
    with pytest.raises(
        LrfaceError, match="face.png: a file of no known format; training data is packed data"
    ):
        open_source(path)


def test_one_identity_is_refused():
    with pytest.raises(
        LrfaceError, match=r"faces holds one identity only \(ann\).*folder above the identity folders"
    ):
        check_source(Listed(["ann"], [0, 0]), "faces")


def test_gaps_in_the_labels_are_named():
    with pytest.raises(LrfaceError, match=r"2 of 4 identities have no image, the first is label 1 \(bob\)"):
        check_source(Listed(["ann", "bob", "cid", "dan"], [0, 0, 3]), "faces")


@pytest.mark.parametrize("labels, found", [([0, 5], "from 0 to 5"), ([-1, 1], "from -1 to 1")])
def test_labels_outside_of_the_identities_are_named(labels, found):
    with pytest.raises(
        LrfaceError, match=f"labels run {found} but there are 2 identities; labels must be 0 to 1"
    ):
        check_source(Listed(["ann", "bob"], labels), "faces")


def test_no_images_are_refused():
    with pytest.raises(LrfaceError, match="faces holds no images"):
        check_source(Listed(["ann", "bob"], []), "faces")
