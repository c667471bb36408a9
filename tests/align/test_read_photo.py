"""Every kind of image file as upright RGB, and every kind of broken file as a reason."""

import io
import os
import pickle
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from lrface.align.pipeline import UnreadableImage, read_photo, read_reduced
from lrface.errors import LrfaceError


@pytest.fixture
def colours():
    """A smooth picture, 40 x 30, that survives JPEG; its four corners differ."""
    y, x = np.mgrid[:30, :40]
    return np.stack([x * 6, y * 8, 255 - (x + y) * 3], axis=2).astype(np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_paths_bytes_and_pil_images(tmp_path, colours):
    image = Image.fromarray(colours)
    data = encoded(image, "PNG")
    (tmp_path / "photo.png").write_bytes(data)
    for photo in (tmp_path / "photo.png", str(tmp_path / "photo.png"), data, image):
        pixels = read_photo(photo)
        assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.flags.writeable
        np.testing.assert_array_equal(pixels, colours)


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "TIFF", "PPM", "WEBP", "GIF"])
def test_formats(colours, kind):
    pixels = read_photo(encoded(Image.fromarray(colours), kind))
    assert pixels.shape == colours.shape
    assert np.abs(pixels.astype(int) - colours).mean() < 6


@pytest.mark.parametrize("mode", ["L", "1", "LA", "I;16", "F"])
def test_grey_of_every_depth(mode, colours):
    grey = colours[:, :, 0]
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    elif mode == "1":
        image = Image.fromarray(grey > 100)
        grey = np.where(grey > 100, 255, 0)
    else:
        image = Image.fromarray(grey).convert(mode)
    pixels = read_photo(encoded(image, "TIFF" if mode == "F" else "PNG"))
    np.testing.assert_array_equal(pixels, np.repeat(grey[:, :, None], 3, axis=2))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bit_colour(suffix, colours):
    data = cv2.imencode(suffix, colours[:, :, ::-1].astype(np.uint16) * 257)[1].tobytes()
    assert np.abs(read_photo(data).astype(int) - colours).max() <= 1


def test_cmyk(colours):
    pixels = read_photo(encoded(Image.fromarray(colours).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - colours).mean() < 6


def test_transparency_lies_over_white():
    layers = np.zeros((4, 4, 4), np.uint8)
    layers[:, 2:] = (10, 200, 30, 255)
    layers[:, :2] = (255, 0, 0, 0)
    pixels = read_photo(encoded(Image.fromarray(layers), "PNG"))
    assert (pixels[:, :2] == 255).all() and (pixels[:, 2:] == (10, 200, 30)).all()
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([5, 6, 7, 80, 90, 100])
    pixels = read_photo(encoded(palette, "PNG", transparency=0))
    assert pixels.tolist() == [[[255, 255, 255], [80, 90, 100]]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    pixels = read_photo(data)
    assert pixels.shape == (10, 20, 3)
    assert np.abs(pixels.astype(int) - (250, 0, 0)).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, colours):
    # What a viewer shows for a stored image, by the EXIF standard: where its first row and first column go.
    shown = {
        1: colours,
        2: colours[:, ::-1],
        3: colours[::-1, ::-1],
        4: colours[::-1],
        5: colours.transpose(1, 0, 2),
        6: colours.transpose(1, 0, 2)[:, ::-1],
        7: colours.transpose(1, 0, 2)[::-1, ::-1],
        8: colours.transpose(1, 0, 2)[::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(read_photo(encoded(Image.fromarray(colours), "PNG", exif=exif)), shown)


def test_damaged_exif_is_passed_over(colours):
    data = encoded(Image.fromarray(colours), "JPEG", exif=b"Exif\0\0garbage that is no directory")
    assert read_photo(data).shape == (30, 40, 3)


@pytest.mark.parametrize("keep", [0.5, 0.9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated(tmp_path, kind, keep):
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    (tmp_path / "cut.jpg").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UnreadableImage, match="^truncated") as caught:
        read_photo(tmp_path / "cut.jpg")
    assert caught.value.is_image


def raises(path, reason, is_image):
    with pytest.raises(UnreadableImage, match=reason) as caught:
        read_photo(path)
    assert caught.value.is_image is is_image
    assert isinstance(caught.value, LrfaceError)


def test_files_that_are_no_photographs(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    raises(tmp_path / "empty.jpg", "empty file", True)
    (tmp_path / ".gitkeep").write_bytes(b"")
    raises(tmp_path / ".gitkeep", "empty file", False)
    (tmp_path / "notes.txt").write_text("not a photograph")
    raises(tmp_path / "notes.txt", "no known image format", False)
    (tmp_path / "text.jpg").write_text("not a photograph")
    raises(tmp_path / "text.jpg", "damaged: not a readable image despite its name", True)
    (tmp_path / "._photo.jpg").write_bytes(b"\0\5\26\7" + bytes(100))  # what macOS leaves beside a photograph
    raises(tmp_path / "._photo.jpg", "no known image format", False)
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(2000))
    raises(tmp_path / "film.mp4", "no known image format", False)
    (tmp_path / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    raises(tmp_path / "drawing.eps", "no known image format", False)
    (tmp_path / "folder.jpg").mkdir()
    raises(tmp_path / "folder.jpg", "a folder", False)
    os.mkfifo(tmp_path / "pipe.jpg")
    raises(tmp_path / "pipe.jpg", "not a regular file", False)
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    raises(tmp_path / "link.jpg", "link to a file that does not exist", True)
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    raises(tmp_path / "circle.jpg", "cannot be read", True)
    raises(tmp_path / "gone.jpg", "no such file", True)
    raises(b"", "empty file", True)


def test_not_permitted(tmp_path, colours):
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(Image.fromarray(colours), "PNG"))
    path.chmod(0)
    raises(path, "cannot be read: Permission denied", True)


def test_decompression_bomb():
    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    raises(bomb, "too many pixels \\(decompression bomb\\)", True)


def test_numbers_that_are_not_pixels():
    image = Image.fromarray(np.full((5, 5), np.nan, np.float32))
    raises(encoded(image, "TIFF"), "not finite", True)
    raises(Image.fromarray(np.full((5, 5), 100_000, np.int32)), "more than 16 bits", True)


def test_the_error_crosses_processes():
    error = pickle.loads(pickle.dumps(UnreadableImage("truncated: x", False)))
    assert (error.reason, error.is_image, str(error)) == ("truncated: x", False, "truncated: x")


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("side", "shape"),
    [(None, (803, 1001)), (501, (803, 1001)), (500, (402, 501)), (250, (201, 251)), (9, (101, 126))],
)
def test_large_jpegs_are_decoded_small(side, shape, orientation):
    y, x = np.mgrid[:803, :1001]
    smooth = np.stack([x / 4, y / 4, (x + y) / 8], axis=2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(smooth), "JPEG", quality=95, exif=exif)
    pixels, whole = read_reduced(data, side)
    if orientation == 6:  # a quarter turn
        pixels, whole = np.rot90(pixels), whole[::-1]
    assert whole == (803, 1001) and pixels.shape[:2] == shape
    # Pixel i of the copy is the middle of a block of the photograph.
    factor = round(803 / shape[0])
    rows, columns = (
        np.minimum(factor * np.arange(side) + factor // 2, most)
        for side, most in zip(shape, (802, 1000), strict=True)
    )
    assert np.abs(pixels.astype(int) - smooth[rows][:, columns]).max() < 8
    as_png = encoded(Image.fromarray(smooth[::4, ::4]), "PNG")
    assert read_reduced(as_png, 20)[0].shape == (201, 251, 3)  # only JPEG can
