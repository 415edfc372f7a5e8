"""Heat maps as one HTML page that needs nothing else: no script, no font, no request. A policy in it forbids them.

Every map is a table with headers, so that it can be read aloud; the table of entropies at its top leads to each map.
"""

from collections.abc import Iterator
from html import escape

from attendant.heatmap.colours import LEVELS, ink, level, scale
from attendant.heatmap.labels import fit_across, label, safe
from attendant.heatmap.maps import AttentionMap, Layer, Sheet
from attendant.heatmap.words import NOTES, caption, notes, short

MAX_CELLS = 2_000_000
NUMBERED_COLUMNS = 24  # maps with at most so many columns state their weights in the cells
DENSE_COLUMNS = 64  # maps with more columns have small cells

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --text: #18181b; --faint: #63636e; --line: #d4d4d8; --hatch: #b4b4bd;
  --blank: #f4f4f5; --link: #1d4ed8 }
@media (prefers-color-scheme: dark) { :root { --paper: #232329; --text: #ececef; --faint: #b0b0ba; --line: #4b4b55;
  --hatch: #6b6b78; --blank: #303038; --link: #93c5fd } }
body { margin: 0 auto; padding: 1.5rem; max-width: 110rem; background: var(--paper); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line) }
p { max-width: 60rem; margin: .5rem 0 }
a { color: var(--link) }
.key { display: flex; flex-wrap: wrap; gap: .4rem .75rem; align-items: center; margin: 1rem 0 }
.ramp { width: 16rem; height: 1rem; border: 1px solid var(--line) }
.x { background: repeating-linear-gradient(135deg, var(--hatch) 0 1px, var(--blank) 1px 5px) }
.key .x { width: 2rem; height: 1rem; border: 1px solid var(--line) }
.scroll { overflow-x: auto }
.heads { display: flex; flex-wrap: wrap; gap: 1.5rem 2.5rem }
.head { max-width: 100%; content-visibility: auto; contain-intrinsic-size: auto 30rem; scroll-margin-top: 1rem }
.head:target { outline: 2px solid var(--link); outline-offset: .6rem }
table { border-collapse: separate; border-spacing: 1px }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; white-space: nowrap }
th { font-weight: 400; white-space: pre }
th, .n { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 12px; line-height: 1.1 }
thead th { vertical-align: bottom; padding: .2rem 0 }
.upward thead span { writing-mode: vertical-rl; transform: rotate(180deg); display: inline-block }
tbody th { text-align: right; padding: 0 .4rem; position: sticky; left: 0; background: var(--paper) }
.map td { width: 28px; min-width: 28px; height: 28px; padding: 0; text-align: center; font-size: 10px }
.small td { width: 18px; min-width: 18px; height: 18px }
.dense td { width: 12px; min-width: 12px; height: 12px }
.dense { border-spacing: 0 }
.dense th, .dense .n { font-size: 10px }
.map .n { width: auto; min-width: 6.5rem; padding-left: .6rem; text-align: left; color: var(--faint); font-size: 12px;
  white-space: nowrap }
tbody tr:hover th, tbody tr:hover .n { color: var(--text); font-weight: 700 }
.overview td a { display: block; padding: .25rem .6rem; color: inherit; text-align: center;
  font-variant-numeric: tabular-nums }
.overview th a { color: inherit }
.overview thead th { padding: .2rem .5rem }
@media print { .head { break-inside: avoid } }
"""


def render_html(sheet: Sheet) -> str:
    """Return a whole page with the maps of all layers and heads.

    Raises:
        ValueError: there are more than two million cells, more than a browser shows with ease.
    """
    cells = sum(len(head.rows) * len(head.columns) for layer in sheet.layers for head in layer.heads)
    if cells > MAX_CELLS:
        raise ValueError(
            f"the page would have {cells:,} cells; at most {MAX_CELLS:,} are drawn: give fewer tokens or fewer layers"
        )
    return "\n".join(_page(sheet)) + "\n"


def _page(sheet: Sheet) -> Iterator[str]:
    title = _text(sheet.title)
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title>"
    yield f"<style>{_STYLE}{_colours()}</style></head>"
    yield f"<body><h1>{title}</h1>"
    yield (
        "<p>Each row is a token that attends, each column a token that is attended to. "
        f"{NOTES[0].upper()}{NOTES[1:]}; the largest is the logarithm of the number of cells that are not masked.</p>"
    )
    yield (
        '<div class="key"><span>weight 0</span><div class="ramp" role="img" '
        'aria-label="colour scale, from dark at weight 0 to bright at weight 1"></div><span>1</span>'
        '<div class="x" role="img" aria-label="hatching"></div><span>masked</span></div>'
    )
    yield from _overview(sheet)
    yield "<main>"
    for index, layer in enumerate(sheet.layers):
        yield f'<section aria-labelledby="L{index}"><h2 id="L{index}">{_text(layer.title)}</h2><div class="heads">'
        for place, head in enumerate(layer.heads):
            yield from _map(head, f"L{index}H{place}")
        yield "</div></section>"
    yield "</main></body></html>"


def _overview(sheet: Sheet) -> Iterator[str]:
    """The table of mean entropies, coloured by their share of the maximum: where to look, and the way there."""
    most = max((len(layer.heads) for layer in sheet.layers), default=0)
    longest: Layer | None = next((layer for layer in sheet.layers if len(layer.heads) == most), None)
    titles = [head.title for head in longest.heads] if longest else []
    yield '<nav class="scroll" aria-label="layers and heads"><table class="overview">'
    yield "<caption>Mean entropy in nats; the brighter, the nearer to its maximum</caption>"
    names = "".join(f'<th scope="col">{_text(one)}</th>' for one in titles)
    yield f"<thead><tr><td></td>{names}</tr></thead><tbody>"
    for index, layer in enumerate(sheet.layers):
        links = "".join(
            f'<td class="c{level(_share(head))}" title="of at most {head.mean_maximum:.3f}">'
            f'<a href="#L{index}H{place}">{head.mean_entropy:.2f}</a></td>'
            for place, head in enumerate(layer.heads)
        )
        yield f'<tr><th scope="row"><a href="#L{index}">{_text(layer.title)}</a></th>{links}</tr>'
    yield "</tbody></table></nav>"


def _map(head: AttentionMap, anchor: str) -> Iterator[str]:
    columns = len(head.columns)
    size = "map" if columns <= NUMBERED_COLUMNS else "map small" if columns <= DENSE_COLUMNS else "map dense"
    labels = [label(token) for token in head.columns]
    direction = "" if fit_across(labels) else " upward"
    yield f'<div class="head scroll" id="{anchor}"><table class="{size}{direction}">'
    yield f"<caption>{_text(caption(head))}</caption>"
    names = "".join(f'<th scope="col"><span>{escape(one)}</span></th>' for one in labels)
    yield f'<thead><tr><td></td>{names}<th scope="col" class="n">  entropy / max</th></tr></thead><tbody>'
    for row, (token, note) in enumerate(zip(head.rows, notes(head), strict=True)):
        cells = "".join(
            _cell(weight, is_numbered=columns <= NUMBERED_COLUMNS)
            if head.allows(row, column)
            else '<td class="x" title="masked"></td>'
            for column, weight in enumerate(head.weights[row])
        )
        yield f'<tr><th scope="row">{escape(label(token))}</th>{cells}<td class="n">{note}</td></tr>'
    yield "</tbody></table></div>"


def _cell(weight: float, *, is_numbered: bool) -> str:
    return f'<td class="c{level(weight)}" title="{weight:.4g}">{short(weight) if is_numbered else ""}</td>'


def _colours() -> str:
    """The rules that colour cells, c0 to c255, and the scale that explains them."""
    colours = [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in scale()]
    rules = []
    for index, background in enumerate(colours):
        text = "#fff" if ink(index / (LEVELS - 1)) == (255, 255, 255) else "#000"
        rules.append(f".c{index} {{ background: {background}; color: {text} }}")
    rules.append(f".ramp {{ background: linear-gradient(to right, {', '.join(colours[::15])}) }}")
    return "\n".join(rules)


def _share(head: AttentionMap) -> float:
    return head.mean_entropy / head.mean_maximum if head.mean_maximum else 0.0


def _text(text: str) -> str:
    return escape(safe(text))
