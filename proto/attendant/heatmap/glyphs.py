"""Text in pictures: one font for all, so that a picture does not depend on the fonts of a machine.

The font is Pillow's own. It has few letters beyond ASCII; a character that it lacks is spelt out. Sizes are pixels.
"""

from functools import cache
from math import ceil

from PIL import Image, ImageDraw, ImageFont

from attendant.heatmap.labels import safe, spelt

TITLE_SIZE, TEXT_SIZE, NUMBER_SIZE = 30, 20, 16
_MISSING = "\uffff"  # no character at all: what is drawn for it stands for every glyph that a font lacks


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font in a size."""
    loaded = ImageFont.load_default(size)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        raise RuntimeError("this build of Pillow has no FreeType, which draws the labels; install one that has it")
    return loaded


def drawable(text: str) -> str:
    """Return text with every character spelt out that cannot be seen or that the font lacks."""
    return "".join(character if _has_glyph(character) else spelt(character) for character in safe(text))


def length(text: str, size: int) -> int:
    """Return how wide a line of drawable text is."""
    return ceil(font(size).getlength(text))


def stencil(text: str, size: int, *, upward: bool) -> Image.Image:
    """Return a line of drawable text to paste a colour through; it is read from below where it goes upward."""
    line = Image.new("L", (max(length(text, size), 1), size + 6))
    ImageDraw.Draw(line).text((0, line.height // 2), text, 255, font(size), anchor="lm")
    return line.transpose(Image.Transpose.ROTATE_90) if upward else line


@cache
def _has_glyph(character: str) -> bool:
    shapes = font(TEXT_SIZE)
    return bytes(shapes.getmask(character)) != bytes(shapes.getmask(_MISSING))
