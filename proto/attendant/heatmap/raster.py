"""Heat maps as a PNG: the heads of one layer side by side, over one scale. All lengths are pixels."""

import io
from math import ceil, sqrt

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from attendant.heatmap.colours import colour
from attendant.heatmap.glyphs import TEXT_SIZE, TITLE_SIZE, drawable, font, length
from attendant.heatmap.maps import Layer
from attendant.heatmap.panel import BACKGROUND, GAP, TEXT, Panel, hatching
from attendant.heatmap.words import NOTES, caption

MAX_PIXELS = 64_000_000
MARGIN = 32
SCALE_WIDTH, SCALE_HEIGHT = 320, 20
KEY_WIDTH = SCALE_WIDTH + MARGIN + 2 * SCALE_HEIGHT + GAP  # the scale and a sample of hatching
KEY_HEIGHT = SCALE_HEIGHT + GAP + TEXT_SIZE
EXPLANATION = f"masked;  {NOTES}"


def render_png(layer: Layer) -> bytes:
    """Draw the heads of a layer and return the bytes of a PNG.

    Raises:
        ValueError: the picture would have more than 64 million pixels.
    """
    title = drawable(layer.title)
    panels = [Panel(head) for head in layer.heads]
    across_one = max(panel.width for panel in panels) + MARGIN
    down_one = max(panel.height for panel in panels) + MARGIN
    across = min(max(round(sqrt(len(panels) * down_one / across_one)), 1), len(panels))  # as square as panels allow
    head_room = MARGIN + TITLE_SIZE + MARGIN
    least = max(length(title, TITLE_SIZE), KEY_WIDTH + length(EXPLANATION, TEXT_SIZE)) + MARGIN
    width = MARGIN + max(across * across_one, least)
    height = head_room + ceil(len(panels) / across) * down_one + KEY_HEIGHT + MARGIN
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{layer.title!r} would be a picture of {width} x {height} pixels; at most {MAX_PIXELS:,} are drawn: "
            "give fewer tokens or fewer heads"
        )
    image = Image.new("RGB", (width, height), BACKGROUND)
    ImageDraw.Draw(image).text((MARGIN, MARGIN), title, TEXT, font(TITLE_SIZE))
    for index, panel in enumerate(panels):
        panel.draw(image, MARGIN + index % across * across_one, head_room + index // across * down_one)
    _draw_key(image, MARGIN, height - MARGIN - KEY_HEIGHT)
    about = PngInfo()
    about.add_itxt("Title", title)
    about.add_itxt("Description", "; ".join(drawable(caption(head)) for head in layer.heads))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=about)
    return file.getvalue()


def _draw_key(image: Image.Image, x: int, y: int) -> None:
    """Draw the scale, a sample of hatching, and what is said beside rows."""
    draw = ImageDraw.Draw(image)
    for offset in range(SCALE_WIDTH):
        draw.line((x + offset, y, x + offset, y + SCALE_HEIGHT - 1), colour(offset / (SCALE_WIDTH - 1)))
    below = y + SCALE_HEIGHT + GAP // 2
    for value, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
        draw.text((x + round(value * SCALE_WIDTH), below), f"{value:g}", TEXT, font(TEXT_SIZE), anchor=anchor)
    image.paste(hatching(2 * SCALE_HEIGHT, SCALE_HEIGHT), (x + SCALE_WIDTH + MARGIN, y))
    beside = (x + KEY_WIDTH, y + SCALE_HEIGHT // 2)
    draw.text(beside, EXPLANATION, TEXT, font(TEXT_SIZE), anchor="lm")
