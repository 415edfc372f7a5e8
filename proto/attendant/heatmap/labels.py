"""Tokens as labels: every character visible, none that could act on a terminal or turn a line of text around."""

import unicodedata
from collections.abc import Iterable

SPACE, ASCII_SPACE = "\N{OPEN BOX}", "_"
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
_NAMED = {" ": " ", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
_WIDE = ("W", "F")
_COMBINING = ("Mn", "Me")
# Controls, formats (which turn text around), surrogates, private and unassigned characters, separators.
_SPELT = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")


def safe(text: str) -> str:
    """Return text with characters that cannot be seen spelt out, spaces aside."""
    return "".join(map(_visible, text))


def label(token: str, *, space: str = SPACE) -> str:
    """Return a token as a label: what cannot be seen is spelt out, and a space is shown as `space`."""
    text = safe(token).replace(" ", space)
    # A mark that combines with what precedes it would sit on a neighbour's cell.
    return f"\N{DOTTED CIRCLE}{text}" if text and not width(text[0]) else text


def spelt(character: str) -> str:
    """Return the escape that Python writes for a character: two, four or eight hexadecimal digits."""
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def width(text: str) -> int:
    """Return how many columns of a terminal a label takes."""
    return sum(map(_columns, text))


def fit_across(labels: Iterable[str]) -> bool:
    """Say whether labels of columns are so short, as letters are, that they need not be turned upwards."""
    return all(width(text) <= 2 for text in labels)


def shortened(text: str, limit: int, ellipsis: str = ELLIPSIS) -> str:
    """Return a label that takes at most `limit` columns; one that is cut ends in an ellipsis."""
    if width(text) <= limit:
        return text
    room, kept = limit - width(ellipsis), ""
    for character in text:
        room -= _columns(character)
        if room < 0:
            break
        kept += character
    return kept + ellipsis


def clusters(text: str) -> list[str]:
    """Split a label into characters, each with the marks that combine with it."""
    result: list[str] = []
    for character in text:
        if result and not _columns(character):
            result[-1] += character
        else:
            result.append(character)
    return result


def _visible(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    return spelt(character) if unicodedata.category(character) in _SPELT else character


def _columns(character: str) -> int:
    if unicodedata.category(character) in _COMBINING:
        return 0
    return 2 if unicodedata.east_asian_width(character) in _WIDE else 1
