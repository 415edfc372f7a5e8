"""Whether a half graph is the fp32 graph of the same decoder in another type, node for node and edge for edge.

The fp32 twin can be run and measured on any processor, a half graph only where there are kernels for it. Where both
are the same graph of the same numbers, what was measured on the one holds for the other but for rounding.
"""

from itertools import zip_longest

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import DataType

from export.weights import DecoderWeights, map_tensors

_SMALL = 1 << 16
_LOGITS = "logits"  # float32 in every graph
_Row = tuple[object, ...]


def differing_nodes(half: ir.Graph, twin: ir.Graph, dtype: DataType) -> list[str]:
    """Return the nodes, inputs and outputs of `half` that are other than what stands in the same place in `twin`.

    What is float32 in the twin must be `dtype`, save the logits, which a Cast makes float32 at the end. Of weights
    only names and shapes are compared.
    """
    pairs = zip_longest(_rows(half, dtype), _rows(twin, DataType.FLOAT))
    return [f"{row} instead of {other}" for row, other in pairs if row != other]


def differing_weights(half: ir.Graph, twin: ir.Graph) -> list[str]:
    """Return the names of those of the twin's weights that the half graph does not hold as exactly the same numbers."""
    return [
        name
        for name, value in twin.initializers.items()
        if value.dtype is DataType.FLOAT
        and (name not in half.initializers or not np.array_equal(_numbers(half.initializers[name]), _numbers(value)))
    ]


def hollow(weights: DecoderWeights) -> DecoderWeights:
    """Return float32 weights of the same shapes that take next to no memory: enough to trace a graph.

    Small ones keep their values, because PyTorch's exporter stores small tensors that are equal only once.
    """
    return map_tensors(
        weights, lambda each: each.float() if each.numel() <= _SMALL else torch.zeros(()).expand(each.shape)
    )


def _rows(graph: ir.Graph, dtype: DataType) -> list[_Row]:
    """Describe a graph by what it computes: values are called by their place, and `dtype` is called "number"."""
    nodes = list(graph)
    labels: dict[ir.Value, _Row] = {value: ("input", value.name) for value in graph.inputs}
    casts = nodes[-1:] if dtype is not DataType.FLOAT else []
    rows: list[_Row] = [("input", value.name, _type(value, dtype), str(value.shape)) for value in graph.inputs]
    for place, node in enumerate(nodes):
        inputs = tuple(None if value is None else labels.get(value) or _constant(value, dtype) for value in node.inputs)
        if node in casts and node.op_type == "Cast" and node.outputs[0].dtype is DataType.FLOAT:
            labels[node.outputs[0]] = inputs[0] or ()
            continue
        labels |= {value: ("node", place, index) for index, value in enumerate(node.outputs)}
        # What nobody reads (the statistics of norms) may have a type of its own.
        read = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        attributes = sorted((name, _value(attribute)) for name, attribute in node.attributes.items())
        types = [_type(value, dtype) for value in read]
        rows.append((node.domain, node.op_type, attributes, inputs, types))
    for value in graph.outputs:
        kind = str(value.dtype) if value.name == _LOGITS else _type(value, dtype)
        rows.append(("output", value.name, kind, str(value.shape), labels.get(value)))
    return rows


def _value(attribute: ir.Attr) -> str:
    """Return the value as a file would hold it: a graph that was never saved has wider floats."""
    return str(np.float32(attribute.value) if attribute.type is ir.AttributeType.FLOAT else attribute.value)


def _type(value: ir.Value, dtype: DataType) -> str:
    return "number" if value.dtype is dtype else str(value.dtype)


def _constant(value: ir.Value, dtype: DataType) -> _Row:
    """Describe a weight by its name, and an integer, such as a shape or an axis, by its value."""
    if value.const_value is None:
        return ("unknown", value.name)
    if value.dtype in (DataType.INT32, DataType.INT64):
        return ("integers", str(value.const_value.numpy().tolist()), str(value.dtype))
    return ("weight", value.name, _type(value, dtype), str(value.shape))


def _numbers(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None, value.name
    return value.const_value.numpy().astype(np.float32)
