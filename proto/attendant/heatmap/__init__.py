"""Attention heat maps from plain arrays: as a PNG, as one HTML page, on a terminal.

    from attendant.heatmap import AttentionMap, Layer, Sheet, render_html

    head = AttentionMap.of(weights, rows=tokens, columns=tokens, title="head 0")
    page = render_html(Sheet(title="what it read", layers=(Layer(title="layer 0", heads=(head,)),)))

Every drawing uses one colour scale from 0 to 1, hatches the cells that a mask hides, and states entropies in nats
beside the largest that they could be.
"""

from attendant.heatmap.files import write_pngs
from attendant.heatmap.maps import AttentionMap, Layer, Sheet, entropy_nats
from attendant.heatmap.page import render_html
from attendant.heatmap.raster import render_png
from attendant.heatmap.terminal import entropy_table, render_terminal, takes_colours

__all__ = [
    "AttentionMap",
    "Layer",
    "Sheet",
    "entropy_nats",
    "entropy_table",
    "render_html",
    "render_png",
    "render_terminal",
    "takes_colours",
    "write_pngs",
]
