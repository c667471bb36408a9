"""What a data set is: counts and sizes against what was planted, and the contact sheet."""

import cv2
import numpy as np
import pytest
from PIL import Image

from lrface.data.folder import FolderSource
from lrface.data.info import describe_source, draw_source, spread
from lrface.data.sheet import LABEL_WIDTH, MARGIN, TILE, SheetRow, draw_sheet
from lrface.data.synthetic import SyntheticFaces
from lrface.errors import UsageError


def write(path, image, suffix=".png"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(suffix, image[:, :, ::-1])[1].tobytes())


@pytest.fixture
def folder(tmp_path):
    """Three identities with 1, 2 and 5 images: skin-coloured, one grey, one larger, one JPEG, one broken."""
    root = tmp_path / "faces"
    skin = np.full((40, 40, 3), (200, 140, 120), np.uint8)
    for name, count in (("ada", 1), ("bela", 2), ("çelik", 5)):
        for number in range(count):
            write(root / name / f"{number}.png", skin)
    write(root / "çelik" / "1.png", np.full((60, 50, 3), (200, 140, 120), np.uint8))
    write(root / "çelik" / "2.png", np.full((40, 40, 3), 90, np.uint8))
    (root / "çelik" / "3.png").write_bytes(cv2.imencode(".jpg", skin[:, :, ::-1])[1].tobytes())
    (root / "çelik" / "4.png").write_text("no image")
    return root


def test_counts_sizes_and_encodings_are_those_planted(folder):
    info = describe_source(FolderSource(folder), str(folder))
    assert (info.format, info.images, info.identities, info.identities_without_images) == ("folder", 8, 3, 0)
    assert info.per_identity == {"least": 1, "median": 2.0, "mean": pytest.approx(8 / 3), "most": 5}
    assert info.histogram == [[1, 1, 1], [2, 2, 1], [3, 4, 0], [5, 8, 1]]
    assert info.sizes == [[40, 40, 6], [50, 60, 1]]
    assert info.encodings == {"PNG": 6, "JPEG": 1}
    assert (info.headers, info.unreadable, info.decoded) == (8, 1, 7)
    lengths = sorted(len(path.read_bytes()) for path in folder.rglob("*.png") if path.name != "4.png")
    assert info.bytes_per_image == {
        "least": lengths[0],
        "mean": pytest.approx(sum(lengths) / 7),
        "most": lengths[-1],
    }
    assert info.grey == pytest.approx(1 / 7)
    assert info.red_over_blue == 1.0
    text = str(info)
    for expected in (
        "40x40 85.7%, 50x60 14.3%",
        "PNG 85.7%, JPEG 14.3%",
        "1 of them",
        "as skin is",
        "5-8 images",
    ):
        assert expected in text


def test_swapped_colours_are_noticed(tmp_path):
    for number in range(4):
        write(tmp_path / "blue" / f"{number}.png", np.full((40, 40, 3), (120, 140, 200), np.uint8))
    info = describe_source(FolderSource(tmp_path), "blue")
    assert info.red_over_blue == 0.0
    assert "PROBABLY SWAPPED" in str(info)


def test_stored_pixels_say_so_and_the_order_by_convention_is_named():
    source = SyntheticFaces(identities=3, images_per_identity=2, size=48)
    info = describe_source(source, "synthetic")
    assert info.encodings == {"pixels": 6}
    assert info.sizes == [[48, 48, 6]]
    assert info.bytes_per_image is None
    assert "convention" not in info.colour
    source.format = "bcolz"
    assert "BGR by the convention of InsightFace_Pytorch" in describe_source(source, "carray").colour


def test_large_sets_are_judged_by_a_sample_and_that_is_said(folder, monkeypatch):
    monkeypatch.setattr("lrface.data.info.HEADERS_AT_MOST", 3)
    monkeypatch.setattr("lrface.data.info.DECODED_AT_MOST", 2)
    info = describe_source(FolderSource(folder), "faces")
    assert (info.headers, info.decoded + info.unreadable) == (3, 2)
    assert info.images == 8
    assert "3 evenly spread of the images' headers" in str(info)


@pytest.mark.parametrize("count, at_most", [(1, 5), (5, 5), (7, 3), (1000, 300), (0, 4)])
def test_a_spread_is_even_and_holds_both_ends(count, at_most):
    chosen = spread(count, at_most)
    assert len(chosen) == min(count, at_most)
    assert sorted(set(chosen.tolist())) == chosen.tolist()
    if count > 1:
        assert (chosen[0], chosen[-1]) == (0, count - 1)
        assert np.ptp(np.diff(chosen)) <= 1


def test_the_sheet_shows_the_images_where_their_identity_is(folder, tmp_path):
    source = FolderSource(folder)
    info = describe_source(source, str(folder))
    draw_source(source, info, tmp_path / "a.png")
    draw_source(source, info, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    # Rows go from the most images to the fewest, so the first image of the first row is Çelik's.
    top = MARGIN + 58
    tile = sheet[top : top + TILE, MARGIN + LABEL_WIDTH : MARGIN + LABEL_WIDTH + TILE]
    assert (tile == (200, 140, 120)).all()
    assert sheet.shape[0] == top + 3 * (TILE + 6) - 6 + MARGIN
    # Every row has a caption, which is dark on white.
    for row in range(3):
        caption = sheet[top + row * (TILE + 6) :][:TILE, MARGIN : MARGIN + 200]
        assert (caption < 100).any()


@pytest.mark.parametrize("identities, rows", [(4, 4), (12, 10), (40, 10)])
def test_the_sheet_has_a_row_an_identity_up_to_ten(tmp_path, identities, rows):
    source = SyntheticFaces(identities=identities, images_per_identity=1, size=16)
    info = describe_source(source, "synthetic")
    draw_source(source, info, tmp_path / "sheet.png", images=1)
    assert Image.open(tmp_path / "sheet.png").size[1] == MARGIN + 58 + rows * (TILE + 6) - 6 + MARGIN


def test_a_sheet_without_names_and_with_what_cannot_be_read(folder, tmp_path):
    source = FolderSource(folder)
    info = describe_source(source, "pack", named=False)
    assert (info.identities, info.histogram) == (0, [])
    assert "not named" in str(info)
    draw_source(source, info, tmp_path / "sheet.png", identities=2, images=4)
    assert Image.open(tmp_path / "sheet.png").size[1] == MARGIN + 58 + 2 * (TILE + 6) - 6 + MARGIN


def test_long_names_are_shortened_and_letters_beyond_ascii_are_drawn(tmp_path):
    image = np.zeros((10, 20, 3), np.uint8)
    for name in ("Çelik", "Delik"):
        draw_sheet(tmp_path / f"{name}.png", "title", "note", [SheetRow((name,), [[image]])])
    assert (tmp_path / "Çelik.png").read_bytes() != (tmp_path / "Delik.png").read_bytes()
    draw_sheet(tmp_path / "long.png", "t" * 500, "n", [SheetRow(("x" * 500,), [[image, None]])])
    sheet = np.asarray(Image.open(tmp_path / "long.png").convert("RGB"))
    assert (sheet[:, -MARGIN:] == 255).all()  # nothing runs out of the picture
    assert (sheet[MARGIN + 58 :, MARGIN + LABEL_WIDTH - 10 : MARGIN + LABEL_WIDTH] == 255).all()


def test_a_sheet_is_a_png(tmp_path):
    with pytest.raises(UsageError, match=r"ends in \.png"):
        draw_sheet(tmp_path / "sheet.jpg", "t", "n", [])
