"""Writing the graphs of generating bundles as the manifest describes them: names, types and axes come from there."""

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from attendant.bundle import (
    ADJUSTMENTS,
    CAPACITY,
    LOGIT_ROWS,
    ROWS,
    SOURCE,
    TOKENS,
    GraphKind,
    GraphSpec,
    Role,
    TensorSpec,
)
from export.errors import ExportRefused
from export.onnx_export import trace
from export.operators import OPSET

_TORCH = str(Path(torch.__file__).parent)
_EXAMPLE = {ROWS: 2, TOKENS: 3, CAPACITY: 5, LOGIT_ROWS: 4, SOURCE: 7, ADJUSTMENTS: 3}
_SAMPLE_ORDER = (
    {Role.LOGITS},
    {Role.INVERSE_TEMPERATURE},
    {Role.UNIFORM},
    {Role.TOP_K},
    {Role.TOP_P},
    {Role.MIN_P},
    {Role.ADJUSTED_IDS},
    {Role.REPETITION},
    {Role.PENALTY},
    {Role.BIAS},
)
_ORDER = {
    GraphKind.STEP: (
        {Role.TOKEN_IDS},
        {Role.LENGTHS},
        {Role.TOTAL_LENGTH},
        {Role.LOGITS_INDEX},
        {Role.SOURCE_LENGTHS},
    ),
    GraphKind.ENCODE: ({Role.SOURCE_IDS, Role.IMAGE}, {Role.SOURCE_LENGTHS}),
    GraphKind.SAMPLE: _SAMPLE_ORDER,
    GraphKind.SAMPLE_FILTERED: _SAMPLE_ORDER,
    GraphKind.LOGPROBS: ({Role.LOGITS}, {Role.CHOICES}),
}


def write_graph(
    module: nn.Module,
    graph: GraphSpec,
    directory: Path,
    *,
    max_tokens: int | None = None,
    opset: int = OPSET,
    translations: dict[Any, Any] | None = None,
) -> None:
    """Trace a module as `graph` describes it and write the files into `directory`; arguments as of `trace_graph`.

    Raises:
        ExportRefused: PyTorch cannot trace the module; the message names the line.
    """
    program = trace_graph(module, graph, max_tokens=max_tokens, opset=opset, translations=translations)
    program.save(directory / graph.file, external_data=True)


def trace_graph(
    module: nn.Module,
    graph: GraphSpec,
    *,
    max_tokens: int | None = None,
    opset: int = OPSET,
    translations: dict[Any, Any] | None = None,
) -> torch.onnx.ONNXProgram:
    """Trace a module as `graph` describes it.

    Args:
        module: takes the inputs in the order of `_ORDER`, None for what the graph does not have, then the states as a
            list; returns the outputs.
        graph: what the manifest says.
        max_tokens: most new tokens of a step, where there is a limit.
        opset: the version of ONNX.
        translations: as in `trace`.

    Raises:
        ExportRefused: PyTorch cannot trace the module; the message names the line.
    """
    dims = {axis: torch.export.Dim(axis, min=1) for axis in _EXAMPLE}
    if max_tokens is not None and max_tokens > 1:
        # With the limit known, a mechanism that takes tokens in chunks takes these in one.
        dims[TOKENS] = torch.export.Dim(TOKENS, min=1, max=max_tokens)

    def shape(tensor: TensorSpec) -> dict[int, Any]:
        return {index: dims[axis] for index, axis in enumerate(tensor.axes) if isinstance(axis, str)}

    try:
        program = trace(
            module,
            _arguments(graph, _example),
            _arguments(graph, shape),
            inputs=[tensor.name for tensor in graph.inputs],
            outputs=[tensor.name for tensor in graph.outputs],
            opset=opset,
            translations=translations,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportRefused(f"the {graph.kind} graph cannot be traced: {_reason(error)}") from error
    traced = program.model.graph
    for tensors, values in ((graph.inputs, traced.inputs), (graph.outputs, traced.outputs)):
        for tensor, value in zip(tensors, values, strict=True):
            value.shape = ir.Shape(tensor.axes)  # under the names of the manifest, rather than those of the tracer
    return program


def _reason(error: Exception) -> str:
    """Return the first line of what went wrong, and the last line of code outside PyTorch that led there."""
    cause = error.__cause__ or error
    frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if not frame.filename.startswith(_TORCH)]
    return f"{str(cause).splitlines()[0]} ({frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line})"


def _arguments(graph: GraphSpec, make: Callable[[TensorSpec], Any]) -> tuple[Any, ...]:
    """Return what `make` makes of each input, as the module takes them."""

    def one_of(tensors: Sequence[TensorSpec], roles: set[Role]) -> Any:
        return next((make(tensor) for tensor in tensors if tensor.role in roles), None)

    given = [one_of(graph.inputs, roles) for roles in _ORDER[graph.kind]]
    states = [make(tensor) for tensor in graph.inputs if tensor.role is Role.STATE]
    return (*given, states) if graph.kind is GraphKind.STEP else tuple(given)


def _example(tensor: TensorSpec) -> Tensor:
    """Return a tensor such as a graph is given: lengths of one step, zeros otherwise."""
    shape = [_EXAMPLE[axis] if isinstance(axis, str) else axis for axis in tensor.axes]
    dtype = getattr(torch, tensor.dtype.value)
    match tensor.role:
        case Role.LENGTHS | Role.SOURCE_LENGTHS:
            return torch.full(shape, _EXAMPLE[TOKENS], dtype=dtype)
        case Role.TOTAL_LENGTH:
            return torch.tensor(_EXAMPLE[CAPACITY], dtype=dtype)
        case _:
            return torch.zeros(shape, dtype=dtype)
