"""Heat maps as files."""

import re
from pathlib import Path

from attendant.heatmap.maps import Sheet
from attendant.heatmap.raster import render_png


def write_pngs(sheet: Sheet, directory: Path) -> list[Path]:
    """Write one picture for each layer into a directory, which is made if need be, and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, layer in enumerate(sheet.layers):
        name = re.sub(r"\W+", "-", layer.title.lower()).strip("-")
        paths.append(directory / f"{index:02d}-{name}.png")
        paths[-1].write_bytes(render_png(layer))
    return paths
