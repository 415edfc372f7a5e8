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
_WIDE = frozenset({DataType.FLOAT, DataType.DOUBLE})
_NUMBERS = _WIDE | _INTEGERS | {DataType.FLOAT16}
_ANY = _FLOATS | _WIDE | _INTEGERS | {DataType.BOOL}
# By operator: types of the first input that the provider has a kernel for (docs/OperatorKernels.md of ONNX Runtime).
_KERNELS = {
    "Add": _FLOATS | _NUMBERS,
    "And": {DataType.BOOL},
    "Cast": _ANY,
    "Clip": _WIDE | {DataType.FLOAT16, DataType.INT64},
    "Concat": _ANY,
    "CumSum": _NUMBERS,
    "Div": _FLOATS | _NUMBERS,
    "Equal": _NUMBERS | {DataType.BOOL},
    "Exp": _FLOATS | _WIDE,
    "Gather": _ANY,
    "GatherElements": _ANY,
    "Gelu": _FLOATS,
    "Gemm": _FLOATS,
    "Greater": _NUMBERS,
    "GreaterOrEqual": _NUMBERS,
    "LayerNormalization": _FLOATS,
    "Less": _NUMBERS,
    "LessOrEqual": _NUMBERS,
    "Log": _WIDE | {DataType.FLOAT16},
    "MatMul": _FLOATS,
    "Min": _NUMBERS,
    "Mul": _FLOATS | _NUMBERS,
    "Not": {DataType.BOOL},
    "Or": {DataType.BOOL},
    "Pad": _WIDE | {DataType.FLOAT16, DataType.BOOL},
    "RMSNormalization": _FLOATS,
    "Range": _INTEGERS | {DataType.FLOAT},
    "ReduceMax": _NUMBERS,
    "ReduceMin": _NUMBERS,
    "ReduceSum": _FLOATS | _NUMBERS,
    "Relu": _FLOATS,
    "Reshape": _ANY,
    "ScatterElements": _ANY,
    "Shape": _ANY,
    "Slice": _ANY,
    "Squeeze": _ANY,
    "Sub": _FLOATS | _NUMBERS,
    "TopK": _NUMBERS,
    "Unsqueeze": _ANY,
    "Where": {DataType.BOOL},
    "com.microsoft::GroupQueryAttention": _HALF,
    "com.microsoft::QuickGelu": _FLOATS,
    "com.microsoft::SkipSimplifiedLayerNormalization": _FLOATS,
}
# The last version of ONNX whose operator the provider has, where there are later ones.
_NEWEST = {"Pad": 18, "ReduceMax": 18, "ReduceMin": 18}
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
    version = graph.opset_imports[""]
    found = []
    for node in graph:
        name, dtype = _name(node), node.inputs[0].dtype if node.inputs and node.inputs[0] else None
        if dtype not in _KERNELS.get(name, ()):
            found.append(f"{name} of {dtype}")
        elif version > _NEWEST.get(name, version):
            found.append(f"{name} of opset {version}")
    return found


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
