"""Whether ONNX Runtime's CUDA provider can take a whole graph, read from the graph alone: no device is needed.

A CUDA graph can be captured only if nothing is copied between host and device during a run. So every node needs a
kernel of the provider for its type; and what the host knows (shapes, and arithmetic on them, which ONNX Runtime leaves
to the host) must never meet a tensor of the device. Of ONNX Runtime 1.31; fusions at load only merge nodes that pass.
"""

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir import DataType

_HALF = frozenset({DataType.FLOAT16, DataType.BFLOAT16})
_FLOATS = _HALF | {DataType.FLOAT}
_INTEGERS = frozenset({DataType.INT32, DataType.INT64})
_ANY = _FLOATS | _INTEGERS | {DataType.BOOL}
# By operator: types of the first input that the provider has a kernel for (docs/OperatorKernels.md of ONNX Runtime).
_KERNELS = {
    "Add": _FLOATS | _INTEGERS,
    "Cast": _ANY,
    "Concat": _ANY,
    "Gather": _ANY,
    "Gelu": _FLOATS,
    "Gemm": _FLOATS,
    "LayerNormalization": _FLOATS,
    "MatMul": _FLOATS,
    "Mul": _FLOATS | _INTEGERS,
    "RMSNormalization": _FLOATS,
    "Range": _INTEGERS | {DataType.FLOAT},
    "Relu": _FLOATS,
    "Reshape": _ANY,
    "Shape": _ANY,
    "Squeeze": _ANY,
    "Sub": _FLOATS | _INTEGERS,
    "Unsqueeze": _ANY,
    "com.microsoft::GroupQueryAttention": _HALF,
    "com.microsoft::QuickGelu": _FLOATS,
    "com.microsoft::SkipSimplifiedLayerNormalization": _FLOATS,
}
# Inputs that the provider's kernels read on the host.
_HOST_INPUTS = {
    "Range": {0, 1, 2},
    "Reshape": {1},
    "Squeeze": {1},
    "Unsqueeze": {1},
    "com.microsoft::GroupQueryAttention": {6},  # the total length
}
_SHAPE_ARITHMETIC = {"Add", "Cast", "Concat", "Gather", "Mul", "Squeeze", "Sub", "Unsqueeze"}


def nodes_without_kernel(graph: ir.Graph) -> list[str]:
    """Return the operators, with the type of their first input, that the CUDA provider cannot run."""
    nodes = ((_name(node), node.inputs[0].dtype if node.inputs and node.inputs[0] else None) for node in graph)
    return [f"{name} of {dtype}" for name, dtype in nodes if dtype not in _KERNELS.get(name, ())]


def copies(graph: ir.Graph) -> list[str]:
    """Return what would be copied between host and device in every run, as "value for operator"."""
    return list(_copies(graph))


def _copies(graph: ir.Graph) -> Iterator[str]:
    on_host = {value for value in graph.inputs if _read_on_host(value)}
    for node in graph:
        name = _name(node)
        inputs = {index: value for index, value in enumerate(node.inputs) if value is not None and not _constant(value)}
        if name == "Shape":
            on_host.update(node.outputs)
            continue  # it reads no element
        if name in _SHAPE_ARITHMETIC and inputs and on_host.issuperset(inputs.values()):
            on_host.update(node.outputs)
            continue
        for index, value in inputs.items():
            if (index in _HOST_INPUTS.get(name, ())) != (value in on_host):
                yield f"{value.name} for {name}"


def _read_on_host(value: ir.Value) -> bool:
    uses = value.uses()
    return bool(uses) and all(index in _HOST_INPUTS.get(_name(node), ()) for node, index in uses)


def _constant(value: ir.Value) -> bool:
    return value.const_value is not None


def _name(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type
