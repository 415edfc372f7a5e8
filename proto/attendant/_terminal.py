"""Text for people: tables that line up, and model output that cannot steer a terminal."""

from collections.abc import Sequence

_KEPT = "\n\t"
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in _KEPT}


def visible(text: str) -> str:
    """Return text with control characters spelt out, so that a model cannot send escape sequences."""
    return text.translate(_VISIBLE)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> str:
    """Return rows under a header in columns of equal width; the columns named in `right` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
