"""An explanation as a sheet of heat maps. Imports what draws, which the client itself does not need."""

from attendant._types import AttentionLayer, Explanation
from attendant.heatmap import AttentionMap, Layer, Sheet


def sheet_of(explanation: Explanation, title: str) -> Sheet:
    """Return the maps of all layers and heads.

    Raises:
        ValueError: the explanation has entropies alone.
    """
    return Sheet(title=title, layers=tuple(map(_layer, explanation.layers)))


def _layer(layer: AttentionLayer) -> Layer:
    rows, columns = range(len(layer.rows)), range(len(layer.columns))
    left = len(rows) if layer.left is None else layer.left
    right = len(columns) if layer.right is None else layer.right
    mask = None
    if layer.left is not None or layer.right is not None:
        mask = [[-left <= column - row <= right for column in columns] for row in rows]
    return Layer(
        title=layer.title,
        heads=tuple(
            AttentionMap.of(head.weights, rows=layer.rows, columns=layer.columns, mask=mask, title=f"head {head.head}")
            for head in layer.heads
        ),
    )
