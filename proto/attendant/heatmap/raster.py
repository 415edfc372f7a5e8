"""Heat maps as a PNG: the heads of one layer side by side, under one scale.

All lengths are pixels. Pillow's own font is used, so that a picture does not depend on the fonts of a machine; it has
few letters beyond ASCII, and a character that it lacks is spelt out.
"""

import io
from dataclasses import dataclass
from functools import cache
from math import ceil, sqrt

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from attendant.heatmap.colours import colour, ink
from attendant.heatmap.labels import label, safe, shortened, spelt
from attendant.heatmap.maps import AttentionMap, Layer
from attendant.heatmap.words import NOTES, caption, notes, short

MAX_PIXELS = 64_000_000
MAX_LABEL = 20  # characters; longer tokens are cut
BACKGROUND, TEXT, FAINT = (255, 255, 255), (24, 24, 27), (113, 113, 122)
HATCH_PAPER, HATCH_LINE, HATCH_STEP = (244, 244, 245), (190, 190, 197), 8
TITLE_SIZE, TEXT_SIZE, NUMBER_SIZE = 30, 20, 16
MARGIN, GAP = 32, 12
SMALLEST_CELL, LARGEST_CELL, MAP_SIDE = 4, 44, 1200
NUMBERED_CELL = 34  # cells of at least this size state their weight
LINE = 24  # rows of labels are at least this far apart
SCALE_WIDTH, SCALE_HEIGHT = 320, 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Geometry:
    """Where things lie in the panel of one head."""

    cell: int
    left: int  # of the cells: the row labels end here
    top: int  # of the cells: title and column labels lie above
    width: int
    height: int


def render_png(layer: Layer) -> bytes:
    """Draw the heads of a layer and return the bytes of a PNG.

    Raises:
        ValueError: the picture would have more than 64 million pixels.
    """
    geometries = [_geometry(head) for head in layer.heads]
    panel = (max(one.width for one in geometries), max(one.height for one in geometries))
    across = ceil(sqrt(len(layer.heads) * panel[1] / panel[0]))  # as nearly square as panels allow
    across = min(max(across, 1), len(layer.heads))
    down = ceil(len(layer.heads) / across)
    title = _drawable(layer.title)
    head_room = MARGIN + TITLE_SIZE + MARGIN
    width = max(MARGIN + across * (panel[0] + MARGIN), _length(title, TITLE_SIZE) + 2 * MARGIN, 640)
    height = head_room + down * (panel[1] + MARGIN) + SCALE_HEIGHT + TEXT_SIZE + GAP + MARGIN
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{layer.title!r} would be a picture of {width} x {height} pixels; at most {MAX_PIXELS:,} are drawn: "
            "give fewer tokens or fewer heads"
        )
    image = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), title, TEXT, _font(TITLE_SIZE))
    for index, (head, geometry) in enumerate(zip(layer.heads, geometries, strict=True)):
        x = MARGIN + index % across * (panel[0] + MARGIN)
        y = head_room + index // across * (panel[1] + MARGIN)
        _draw_head(image, draw, head, geometry, x, y)
    _draw_scale(image, draw, MARGIN, height - MARGIN - SCALE_HEIGHT - TEXT_SIZE - GAP)
    about = PngInfo()
    about.add_itxt("Title", layer.title)
    about.add_itxt("Description", "; ".join(caption(head) for head in layer.heads))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=about)
    return file.getvalue()


def _geometry(head: AttentionMap) -> _Geometry:
    cell = MAP_SIDE // max(len(head.rows), len(head.columns), 1)
    cell = min(max(cell, SMALLEST_CELL), LARGEST_CELL)
    left = max((_length(text, TEXT_SIZE) for text in _labels(head.rows)), default=0) + GAP
    above = max((_length(text, TEXT_SIZE) for text in _labels(head.columns)), default=0) + GAP
    top = TEXT_SIZE + 2 * GAP + above
    beside = max((_length(note, NUMBER_SIZE) for note in notes(head)), default=0)
    return _Geometry(
        cell=cell,
        left=left,
        top=top,
        width=max(left + cell * len(head.columns) + GAP + beside, _length(_drawable(caption(head)), TEXT_SIZE)),
        height=top + cell * len(head.rows),
    )


def _draw_head(
    image: Image.Image, draw: ImageDraw.ImageDraw, head: AttentionMap, geometry: _Geometry, x: int, y: int
) -> None:
    draw.text((x, y), _drawable(caption(head)), TEXT, _font(TEXT_SIZE))
    left, top, cell = x + geometry.left, y + geometry.top, geometry.cell
    image.paste(_hatching(cell * len(head.columns), cell * len(head.rows)), (left, top))
    gap = 1 if cell >= 12 else 0  # a line between cells that can spare it
    for row, weights in enumerate(head.weights):
        for column, weight in enumerate(weights):
            if head.allows(row, column):
                corner = (left + column * cell, top + row * cell)
                draw.rectangle((*corner, corner[0] + cell - 1, corner[1] + cell - 1), BACKGROUND)
                draw.rectangle((*corner, corner[0] + cell - 1 - gap, corner[1] + cell - 1 - gap), colour(weight))
                if cell >= NUMBERED_CELL:
                    middle = (corner[0] + cell // 2, corner[1] + cell // 2)
                    draw.text(middle, short(weight), ink(weight), _font(NUMBER_SIZE), anchor="mm")
    every = ceil(LINE / cell)
    for row, (text, note) in enumerate(zip(_labels(head.rows), notes(head), strict=True)):
        if row % every == 0:
            middle_y = top + row * cell + cell // 2
            draw.text((left - GAP, middle_y), text, TEXT, _font(TEXT_SIZE), anchor="rm")
            right = left + cell * len(head.columns) + GAP
            draw.text((right, middle_y), note, FAINT, _font(NUMBER_SIZE), anchor="lm")
    for column, text in enumerate(_labels(head.columns)):
        if column % every == 0:
            upright = _upright(text)
            place = (left + column * cell + (cell - upright.width) // 2, top - GAP - upright.height)
            image.paste(TEXT, place, upright)


def _draw_scale(image: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    for offset in range(SCALE_WIDTH):
        draw.line((x + offset, y, x + offset, y + SCALE_HEIGHT - 1), colour(offset / (SCALE_WIDTH - 1)))
    below = y + SCALE_HEIGHT + GAP // 2
    for value, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
        draw.text((x + round(value * SCALE_WIDTH), below), f"{value:g}", TEXT, _font(TEXT_SIZE), anchor=anchor)
    sample = x + SCALE_WIDTH + MARGIN
    image.paste(_hatching(2 * SCALE_HEIGHT, SCALE_HEIGHT), (sample, y))
    draw.text(
        (sample + 2 * SCALE_HEIGHT + GAP, y + SCALE_HEIGHT // 2),
        f"masked;  {NOTES}",
        TEXT,
        _font(TEXT_SIZE),
        anchor="lm",
    )


def _hatching(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (max(width, 1), max(height, 1)), HATCH_PAPER)
    draw = ImageDraw.Draw(image)
    for start in range(0, width + height, HATCH_STEP):
        draw.line((start, 0, start - height, height), HATCH_LINE, 2)
    return image


def _upright(text: str) -> Image.Image:
    """Return a mask of text that is read from below."""
    mask = Image.new("L", (max(_length(text, TEXT_SIZE), 1), TEXT_SIZE + 6))
    ImageDraw.Draw(mask).text((0, mask.height // 2), text, 255, _font(TEXT_SIZE), anchor="lm")
    return mask.transpose(Image.Transpose.ROTATE_90)


def _labels(tokens: tuple[str, ...]) -> list[str]:
    return [shortened(_drawable(label(token)), MAX_LABEL) for token in tokens]


def _drawable(text: str) -> str:
    return "".join(character if _has_glyph(character) else spelt(character) for character in safe(text))


@cache
def _has_glyph(character: str) -> bool:
    font = _font(TEXT_SIZE)
    missing = "\uffff"  # no character at all: what is drawn for it stands for every glyph that a font lacks
    return bytes(font.getmask(character)) != bytes(font.getmask(missing))


def _length(text: str, size: int) -> int:
    return ceil(_font(size).getlength(text))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this build of Pillow has no FreeType, which draws the labels; install one that has it")
    return font
