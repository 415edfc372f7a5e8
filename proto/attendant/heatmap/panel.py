"""One head in a picture: caption, column labels, and rows of cells between their labels and what is said of them.

All lengths are pixels.
"""

from math import ceil

from PIL import Image, ImageDraw

from attendant.heatmap.colours import Colour, colour, ink
from attendant.heatmap.glyphs import NUMBER_SIZE, TEXT_SIZE, drawable, font, length, stencil
from attendant.heatmap.labels import ASCII_SPACE, fit_across, label, shortened
from attendant.heatmap.maps import AttentionMap
from attendant.heatmap.words import caption, notes, short

BACKGROUND: Colour = (255, 255, 255)
TEXT: Colour = (24, 24, 27)
FAINT: Colour = (100, 100, 110)
GAP = 12
MAX_LABEL = 20  # characters; longer tokens are cut
SMALLEST_CELL, LARGEST_CELL, MAP_SIDE = 4, 44, 1200
NUMBERED_CELL = 34  # cells of at least this size state their weight
SPACED_CELL = 12  # and of this size are set apart by a line
LINE = 20  # labels are at least this far apart; of smaller cells, some have none
_PAPER, _LINE, _STEP = (244, 244, 245), (190, 190, 197), 8


class Panel:
    """The picture of one head: `width` by `height`, drawn wherever it is wanted.

    `cell` is the side of a cell; `left` and `top` are where the cells begin.
    """

    def __init__(self, head: AttentionMap):
        rows, columns = len(head.rows), len(head.columns)
        self._head = head
        self._caption, self._notes = drawable(caption(head)), notes(head)
        self._rows, names = _labels(head.rows), _labels(head.columns)
        self._columns = [stencil(name, TEXT_SIZE, upward=not fit_across(names)) for name in names]
        self.cell = min(max(MAP_SIDE // max(rows, columns, 1), SMALLEST_CELL), LARGEST_CELL)
        self.left = max((length(name, TEXT_SIZE) for name in self._rows), default=0) + GAP
        self.top = TEXT_SIZE + 3 * GAP + max((name.height for name in self._columns), default=0)
        beside = max((length(note, NUMBER_SIZE) for note in self._notes), default=0)
        self.width = max(self.left + self.cell * columns + GAP + beside, length(self._caption, TEXT_SIZE))
        self.height = self.top + self.cell * rows

    def draw(self, image: Image.Image, x: int, y: int) -> None:
        """Draw the head with its upper left corner at a point of an image."""
        draw = ImageDraw.Draw(image)
        draw.text((x, y), self._caption, TEXT, font(TEXT_SIZE))
        left, top, cell = x + self.left, y + self.top, self.cell
        right = left + cell * len(self._columns)
        image.paste(hatching(right - left, cell * len(self._rows)), (left, top))
        self._draw_cells(draw, left, top)
        every = ceil(LINE / cell)
        for row, (name, note) in list(enumerate(zip(self._rows, self._notes, strict=True)))[::every]:
            middle = top + row * cell + cell // 2
            draw.text((left - GAP, middle), name, TEXT, font(TEXT_SIZE), anchor="rm")
            draw.text((right + GAP, middle), note, FAINT, font(NUMBER_SIZE), anchor="lm")
        for column, shape in list(enumerate(self._columns))[::every]:
            image.paste(TEXT, (left + column * cell + (cell - shape.width) // 2, top - GAP - shape.height), shape)

    def _draw_cells(self, draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
        cell, between = self.cell, 1 if self.cell >= SPACED_CELL else 0
        for row, weights in enumerate(self._head.weights):
            for column, weight in enumerate(weights):
                if not self._head.allows(row, column):
                    continue  # the hatching below shows
                x, y = left + column * cell, top + row * cell
                draw.rectangle((x, y, x + cell - 1, y + cell - 1), BACKGROUND)
                draw.rectangle((x, y, x + cell - 1 - between, y + cell - 1 - between), colour(weight))
                if cell >= NUMBERED_CELL:
                    middle = (x + cell // 2, y + cell // 2)
                    draw.text(middle, short(weight), ink(weight), font(NUMBER_SIZE), anchor="mm")


def hatching(width: int, height: int) -> Image.Image:
    """Return a hatched area, which stands for cells that a mask hides."""
    image = Image.new("RGB", (max(width, 1), max(height, 1)), _PAPER)
    draw = ImageDraw.Draw(image)
    for start in range(0, width + height, _STEP):
        draw.line((start, 0, start - height, height), _LINE, 2)
    return image


def _labels(tokens: tuple[str, ...]) -> list[str]:
    return [shortened(drawable(label(token, space=ASCII_SPACE)), MAX_LABEL) for token in tokens]
