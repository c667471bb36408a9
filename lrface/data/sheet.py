"""Contact sheets: rows of faces with captions, drawn into one PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lrface.errors import UsageError
from lrface.files import atomic_file

TILE = 112
GAP = 6
MARGIN = 18
LABEL_WIDTH = 250
INK, GREY, PAPER, EMPTY = (25, 25, 25), (110, 110, 110), (255, 255, 255), (232, 232, 232)


@dataclass(frozen=True)
class SheetRow:
    """One row: lines of text at the left (the first is bold), then groups of images with a gap between groups.

    An image is uint8 [h, w, 3] RGB of any size, or None for one that cannot be shown.
    """

    lines: Sequence[str]
    groups: Sequence[Sequence[np.ndarray | None]]


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib

    # Pillow's own font has no letters beyond ASCII on every version that lrface allows.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """``text``, shortened in its middle until it is at most ``width`` pixels wide."""
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        short = text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]
        if font.getlength(short) <= width:
            return short
    return "…"


def _tile(image: np.ndarray | None) -> Image.Image:
    """The image within a square of ``TILE`` pixels, enlarged or shrunk with its proportions kept."""
    tile = Image.new("RGB", (TILE, TILE), EMPTY)
    if image is None:
        draw = ImageDraw.Draw(tile)
        draw.multiline_text(
            (TILE / 2, TILE / 2), "cannot be\nread", GREY, _font(12), anchor="mm", align="center"
        )
        return tile
    height, width = image.shape[:2]
    scale = TILE / max(height, width)
    if scale != 1:
        shape = max(1, round(width * scale)), max(1, round(height * scale))
        image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    tile.paste(Image.fromarray(image), ((TILE - image.shape[1]) // 2, (TILE - image.shape[0]) // 2))
    return tile


def draw_sheet(
    path: str | Path,
    title: str,
    note: str,
    rows: Sequence[SheetRow],
    columns: Sequence[str] = (),
) -> None:
    """Write a contact sheet to ``path``, a PNG; it appears whole or not at all.

    ``title`` and ``note`` stand above; ``columns`` heads the groups of images, which start at the same place
    in every row. The same rows give the same bytes.

    Raises:
        UsageError: ``path`` does not end in .png.
        LrfaceError: the file cannot be written.
    """
    path = Path(path)
    check_sheet_path(path)
    groups = max((len(row.groups) for row in rows), default=0)
    widest = [
        max((len(row.groups[group]) for row in rows if group < len(row.groups)), default=0)
        for group in range(groups)
    ]
    starts = [MARGIN + LABEL_WIDTH]
    for count in widest:
        starts.append(starts[-1] + count * (TILE + GAP) + 3 * GAP)
    width = max(starts[-1] - 4 * GAP + MARGIN, 640)
    title_font, note_font, bold, plain = _font(22, bold=True), _font(14), _font(15, bold=True), _font(13)
    top = MARGIN + 58 + (24 if columns else 0)
    sheet = Image.new("RGB", (width, top + len(rows) * (TILE + GAP) - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    room = width - 2 * MARGIN
    draw.text((MARGIN, MARGIN), _fitted(title, title_font, room), INK, title_font)
    draw.text((MARGIN, MARGIN + 32), _fitted(note, note_font, room), GREY, note_font)
    for start, end, column in zip(starts, starts[1:], columns, strict=False):
        draw.text((start, MARGIN + 60), _fitted(column, bold, end - start - 2 * GAP), INK, bold)
    for number, row in enumerate(rows):
        y = top + number * (TILE + GAP)
        line_y = y + TILE / 2 - 10 * len(row.lines)
        for line, text in enumerate(row.lines):
            font = plain if line else bold
            draw.text(
                (MARGIN, line_y + 20 * line),
                _fitted(text, font, LABEL_WIDTH - 2 * GAP),
                GREY if line else INK,
                font,
            )
        for start, group in zip(starts, row.groups, strict=False):
            for column_number, image in enumerate(group):
                sheet.paste(_tile(image), (start + column_number * (TILE + GAP), y))
    with atomic_file(path) as aside:
        sheet.save(aside, format="PNG")


def check_sheet_path(path: Path) -> None:
    """Raises UsageError unless ``path`` ends in .png: asked before long work, not after it."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: a contact sheet is a PNG; give a file name that ends in .png")
