"""Heat maps on a terminal: blocks of 24-bit colour, or ASCII alone where there is no colour.

A cell is two columns wide, which makes it nearly square and lets a wide character stand above it.
"""

import os
from typing import TextIO

from attendant._terminal import table
from attendant.heatmap.colours import colour
from attendant.heatmap.labels import ASCII_SPACE, ELLIPSIS, SPACE, clusters, label, safe, shortened, width
from attendant.heatmap.maps import AttentionMap, Sheet
from attendant.heatmap.words import NOTES, caption, notes

ROW_LABEL, COLUMN_LABEL = 20, 12  # characters; longer tokens are cut
RAMP = " .:-=+*#%@"
ASCII_HIDDEN, HIDDEN = "//", "\N{BOX DRAWINGS LIGHT DIAGONAL UPPER RIGHT TO LOWER LEFT}" * 2
RESET, FAINT = "\x1b[0m", "\x1b[38;2;128;128;128m"
STEPS = 11  # of the scale that explains the colours


def takes_colours(stream: TextIO) -> bool:
    """Say whether a stream is a terminal for 24-bit colour and Unicode, and the user has not set NO_COLOR."""
    capable = stream.isatty() and os.environ.get("TERM") != "dumb" and "utf" in (stream.encoding or "").lower()
    return capable and not os.environ.get("NO_COLOR")


def render_terminal(sheet: Sheet, *, colours: bool) -> str:
    """Return the maps of all layers and heads as lines of text.

    Args:
        sheet: what to show.
        colours: use 24-bit colour and Unicode, where `takes_colours`; otherwise ASCII alone.
    """
    parts = [_plain(sheet.title, colours)]
    for layer in sheet.layers:
        parts.append(_plain(layer.title, colours))
        parts += ["\n".join(_lines(head, colours)) for head in layer.heads]
    block = _coloured if colours else _shaded
    steps = "".join(block(step / (STEPS - 1)) for step in range(STEPS))
    hidden = f"{FAINT}{HIDDEN}{RESET}" if colours else ASCII_HIDDEN
    parts.append(f"0 {steps} 1   {hidden} masked   {NOTES}")
    return "\n\n".join(parts)


def entropy_table(sheet: Sheet) -> str:
    """Return the mean entropy of every head beside the mean of its maxima, as a table."""
    rows = [
        (
            _plain(layer.title, False),
            _plain(head.title, False),
            f"{head.mean_entropy:.3f}",
            f"{head.mean_maximum:.3f}",
            f"{head.mean_entropy / head.mean_maximum:.0%}" if head.mean_maximum else "-",
        )
        for layer in sheet.layers
        for head in layer.heads
    ]
    header = ("ATTENTION", "HEAD", "ENTROPY (NATS)", "MAXIMUM", "SHARE")
    return table(header, rows, right=header[2:])


def _lines(head: AttentionMap, colours: bool) -> list[str]:
    block = _coloured if colours else _shaded
    hidden = f"{FAINT}{HIDDEN}{RESET}" if colours else ASCII_HIDDEN
    names = [_cut(token, ROW_LABEL, colours) for token in head.rows]
    margin = max(map(width, names), default=0)
    lines = [_plain(caption(head), colours)]
    lines += [" " * (margin + 1) + line for line in _column_labels(head, colours)]
    for row, (name, note) in enumerate(zip(names, notes(head), strict=True)):
        cells = "".join(
            block(weight) if head.allows(row, column) else hidden for column, weight in enumerate(head.weights[row])
        )
        lines.append(f"{' ' * (margin - width(name))}{name} {cells} {note}")
    return lines


def _column_labels(head: AttentionMap, colours: bool) -> list[str]:
    """Return the labels of the columns, written downwards and ending on the line above the cells."""
    names = [clusters(_cut(token, COLUMN_LABEL, colours)) for token in head.columns]
    height = max(map(len, names), default=0)
    padded = [[""] * (height - len(name)) + name for name in names]
    return ["".join(name[line] + " " * (2 - width(name[line])) for name in padded).rstrip() for line in range(height)]


def _cut(token: str, limit: int, colours: bool) -> str:
    text = _encodable(label(token, space=SPACE if colours else ASCII_SPACE), colours)
    return shortened(text, limit, ELLIPSIS if colours else "..")


def _plain(text: str, colours: bool) -> str:
    return _encodable(safe(text), colours)


def _encodable(text: str, colours: bool) -> str:
    return text if colours else text.encode("ascii", "backslashreplace").decode()


def _coloured(weight: float) -> str:
    red, green, blue = colour(weight)
    return f"\x1b[38;2;{red};{green};{blue}m\N{FULL BLOCK}\N{FULL BLOCK}{RESET}"


def _shaded(weight: float) -> str:
    return RAMP[round(min(max(weight, 0.0), 1.0) * (len(RAMP) - 1))] * 2
