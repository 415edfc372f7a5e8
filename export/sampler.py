"""The graphs that choose tokens on a device, as the manifest describes them, and how they are written."""

from functools import cache
from pathlib import Path

import torch

from attendant.bundle import ADJUSTMENTS, ROWS, Axis, DType, GraphKind, GraphSpec, Role, TensorSpec
from export.described import trace_graph
from export.sampler_graph import TOP_LOGPROBS, LogprobsGraph, SamplerGraph

OPSET = 18
"""The newest version whose ReduceMax and ReduceMin ONNX Runtime has on CUDA; later ones would run on the CPU."""


def sampler_graphs(vocab_size: int) -> tuple[GraphSpec, ...]:
    """Describe the graphs that choose among `vocab_size` tokens, without and with filters, and tell probabilities."""
    logits = _tensor(Role.LOGITS, DType.FLOAT32, ROWS, vocab_size)
    request = (
        _tensor(Role.INVERSE_TEMPERATURE, DType.FLOAT32, ROWS),
        _tensor(Role.UNIFORM, DType.FLOAT64, ROWS),
    )
    filters = (
        _tensor(Role.TOP_K, DType.INT64, ROWS),
        _tensor(Role.TOP_P, DType.FLOAT64, ROWS),
        _tensor(Role.MIN_P, DType.FLOAT32, ROWS),
    )
    adjustments = (
        _tensor(Role.ADJUSTED_IDS, DType.INT64, ROWS, ADJUSTMENTS),
        *(_tensor(role, DType.FLOAT32, ROWS, ADJUSTMENTS) for role in (Role.REPETITION, Role.PENALTY, Role.BIAS)),
    )
    choices = _tensor(Role.CHOICES, DType.INT64, ROWS)
    num_top = min(TOP_LOGPROBS, vocab_size)
    told = (
        _tensor(Role.LOGPROBS, DType.FLOAT32, ROWS),
        _tensor(Role.TOP_IDS, DType.INT64, ROWS, num_top),
        _tensor(Role.TOP_LOGPROBS, DType.FLOAT32, ROWS, num_top),
    )
    return (
        _graph(GraphKind.SAMPLE, (logits, *request, *adjustments), (choices,)),
        _graph(GraphKind.SAMPLE_FILTERED, (logits, *request, *filters, *adjustments), (choices,)),
        _graph(GraphKind.LOGPROBS, (logits, choices), told),
    )


def write_sampler(directory: Path, vocab_size: int) -> tuple[GraphSpec, ...]:
    """Write the graphs into `directory` and return what the manifest says of them."""
    graphs = sampler_graphs(vocab_size)
    for graph in graphs:
        _program(graph, vocab_size).save(directory / graph.file, external_data=False)
    return graphs


@cache
def _program(graph: GraphSpec, vocab_size: int) -> torch.onnx.ONNXProgram:
    """Trace one of the graphs; bundles of the same vocabulary have the same."""
    module = LogprobsGraph if graph.kind is GraphKind.LOGPROBS else SamplerGraph
    return trace_graph(module(vocab_size), graph, opset=OPSET)


def _tensor(role: Role, dtype: DType, *axes: Axis) -> TensorSpec:
    return TensorSpec(name=role.value, role=role, dtype=dtype, axes=axes)


def _graph(kind: GraphKind, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> GraphSpec:
    return GraphSpec(kind=kind, file=f"{kind}.onnx", inputs=inputs, outputs=outputs)
