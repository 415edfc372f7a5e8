"""Graphs of any generating model, traced from its own PyTorch code: what a mechanism declares is what is served.

The states of a graph are those that the model declares. B rows, T new tokens, L logit rows, V vocabulary, S source.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.onnx_opset import opset24
from torch import Tensor, nn

from attendant.bundle import (
    CAPACITY,
    LOGIT_ROWS,
    ROWS,
    SOURCE,
    TOKENS,
    Axis,
    DType,
    GraphKind,
    GraphSpec,
    Role,
    StateRule,
    StateSpec,
    TensorSpec,
)
from export.onnx_export import trace
from export.source import Source, target_config
from models.model import Model
from models.states import State
from models.states import StateSpec as Declared

ENCODE_FILE, STEP_FILE = "encode.onnx", "step.onnx"
OPSET = 24
_EXAMPLE = {ROWS: 2, TOKENS: 3, CAPACITY: 5, LOGIT_ROWS: 4, SOURCE: 7}


def _write_in_place(past, new, start):  # type: ignore[no-untyped-def]  # onnxscript reads no annotations here
    return opset24.TensorScatter(past, new, start, axis=2)


TRANSLATIONS = {torch.ops.attendant.write_in_place.default: _write_in_place}


class TracedEncoder(nn.Module):
    """Sources in, what each sequence begins with out: the states that are made."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.names = [spec.name for spec in made_specs(model)]

    def forward(self, source: Tensor, source_lengths: Tensor | None) -> list[Tensor]:
        """Encode sources [B, S] or images, of which the first int32 source_lengths [B] positions are real."""
        lengths = None if source_lengths is None else source_lengths.long()
        state = self.model.begin(self.model.encode(source, lengths), lengths)
        return [state.tensors[name] for name in self.names]


class TracedStep(nn.Module):
    """New tokens and the states before them in, logits of the wanted positions and the states after them out."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.specs = model.state_specs()

    def forward(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        logits_index: Tensor,
        source_lengths: Tensor | None,
        past: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Run one step.

        Args:
            token_ids: int64 [B, T], all real.
            lengths: int32 [B], tokens of each row after this step.
            logits_index: int64 [L], flat positions whose logits are wanted.
            source_lengths: int32 [B], or None where sources are all of one length, or none are.
            past: the states in their order.
        """
        state = State(
            specs=self.specs,
            tensors={spec.name: tensor for spec, tensor in zip(self.specs, past, strict=True)},
            lengths=lengths.long() - token_ids.shape[1],
            capacity=target_config(self.model).max_model_len,
            source_lengths=None if source_lengths is None else source_lengths.long(),
        )
        step = getattr(self.model, "decode", self.model)
        logits, state = step(token_ids, state)
        present = [state.tensors[spec.name] for spec in self.specs if spec.rule != StateRule.FIXED]
        return logits.flatten(0, 1).index_select(0, logits_index), present


def made_specs(model: Model) -> list[Declared]:
    """Return the declarations of the states that are made of a source."""
    return [spec for spec in model.state_specs() if spec.made or spec.rule == StateRule.FIXED]


def describe_states(model: Model, source: Source | None) -> tuple[StateSpec, ...]:
    """Return what the manifest says of the states that a model declares."""
    return tuple(_state(spec, source) for spec in model.state_specs())


def _state(spec: Declared, source: Source | None) -> StateSpec:
    rule = StateRule(spec.rule)
    fixed = rule is StateRule.FIXED
    return StateSpec(
        name=spec.name,
        rule=rule,
        dtype=DType(str(spec.dtype).removeprefix("torch.")),
        axes=(ROWS, *(source.axis if size == SOURCE and source is not None else size for size in spec.shape)),
        input=f"fixed.{spec.name}" if fixed else f"past.{spec.name}",
        output=None if fixed else f"present.{spec.name}",
        made=f"made.{spec.name}" if spec.made or fixed else None,
        # A ring is as long as its window; only what is appended to has positions to release.
        window=spec.window if rule is StateRule.APPEND else None,
    )


def encode_graph(states: Sequence[StateSpec], source: Source) -> GraphSpec:
    """Describe the graph that makes states of a source."""
    outputs = (TensorSpec(name=s.made, role=Role.STATE, dtype=s.dtype, axes=s.axes) for s in states if s.made)
    return GraphSpec(
        kind=GraphKind.ENCODE,
        file=ENCODE_FILE,
        data=f"{ENCODE_FILE}.data",
        inputs=(source.tensor, *_source_lengths(source.axis)),
        outputs=tuple(outputs),
    )


def step_graph(states: Sequence[StateSpec], vocab_size: int, tokens: Axis) -> GraphSpec:
    """Describe the step graph; `tokens` is the axis of new tokens, or 1 where there is one in each step."""
    lengths = _source_lengths(SOURCE) if any(SOURCE in state.axes for state in states) else ()
    return GraphSpec(
        kind=GraphKind.STEP,
        file=STEP_FILE,
        data=f"{STEP_FILE}.data",
        inputs=(
            TensorSpec(name="token_ids", role=Role.TOKEN_IDS, dtype=DType.INT64, axes=(ROWS, tokens)),
            TensorSpec(name="lengths", role=Role.LENGTHS, dtype=DType.INT32, axes=(ROWS,)),
            TensorSpec(name="logits_index", role=Role.LOGITS_INDEX, dtype=DType.INT64, axes=(LOGIT_ROWS,)),
            *lengths,
            *(TensorSpec(name=s.input, role=Role.STATE, dtype=s.dtype, axes=s.axes) for s in states),
        ),
        outputs=(
            TensorSpec(name="logits", role=Role.LOGITS, dtype=DType.FLOAT32, axes=(LOGIT_ROWS, vocab_size)),
            *(TensorSpec(name=s.output, role=Role.STATE, dtype=s.dtype, axes=s.axes) for s in states if s.output),
        ),
    )


def write_encode_graph(model: Model, graph: GraphSpec, directory: Path) -> None:
    """Trace how a model reads sources and write the graph into `directory`."""
    source, *lengths = graph.inputs
    dims = _dims()
    example = (_example(source), _example(lengths[0]) if lengths else None)
    shapes = (_shape(source, dims), _shape(lengths[0], dims) if lengths else None)
    _save(TracedEncoder(model), graph, example, shapes, directory)


def write_step_graph(model: Model, graph: GraphSpec, directory: Path, *, max_tokens: int) -> None:
    """Trace how a model takes at most `max_tokens` new tokens and write the graph into `directory`."""
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    dims = _dims()
    if max_tokens > 1:  # with the limit known, a mechanism that takes tokens in chunks takes these in one
        dims[TOKENS] = torch.export.Dim(TOKENS, min=1, max=max_tokens)
    names = ("token_ids", "lengths", "logits_index", "source_lengths")
    given = [inputs.get(name) for name in names]
    past = [tensor for tensor in graph.inputs if tensor.role is Role.STATE]
    example = (*(None if each is None else _example(each) for each in given), [_example(each) for each in past])
    shapes = (*(None if each is None else _shape(each, dims) for each in given), [_shape(each, dims) for each in past])
    _save(TracedStep(model), graph, example, shapes, directory)


def _save(module: nn.Module, graph: GraphSpec, example: Any, shapes: Any, directory: Path) -> None:
    program = trace(
        module,
        example,
        shapes,
        inputs=[tensor.name for tensor in graph.inputs],
        outputs=[tensor.name for tensor in graph.outputs],
        opset=OPSET,
        translations=TRANSLATIONS,
    )
    onnx_graph = program.model.graph
    for tensors, values in ((graph.inputs, onnx_graph.inputs), (graph.outputs, onnx_graph.outputs)):
        for tensor, value in zip(tensors, values, strict=True):
            value.shape = ir.Shape(tensor.axes)  # under the names of the manifest, rather than those of the tracer
    program.save(directory / graph.file, external_data=True)


def _source_lengths(axis: Axis) -> tuple[TensorSpec, ...]:
    if axis != SOURCE:
        return ()
    return (TensorSpec(name="source_lengths", role=Role.SOURCE_LENGTHS, dtype=DType.INT32, axes=(ROWS,)),)


def _dims() -> dict[str, Any]:
    return {axis: torch.export.Dim(axis, min=1) for axis in _EXAMPLE}


def _shape(tensor: TensorSpec, dims: dict[str, Any]) -> dict[int, Any]:
    return {index: dims[axis] for index, axis in enumerate(tensor.axes) if isinstance(axis, str)}


def _example(tensor: TensorSpec) -> Tensor:
    """Return a tensor such as a graph is given: lengths of one new step each, zeros otherwise."""
    shape = [_EXAMPLE[axis] if isinstance(axis, str) else axis for axis in tensor.axes]
    dtype = getattr(torch, tensor.dtype.value)
    lengths = tensor.role in (Role.LENGTHS, Role.SOURCE_LENGTHS)
    return torch.full(shape, _EXAMPLE[TOKENS], dtype=dtype) if lengths else torch.zeros(shape, dtype=dtype)
