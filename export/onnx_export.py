"""Writing graphs as ONNX, with the tensor names of docs/bundle.md."""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.encode_graph import EncodeGraph
from export.graph import StepGraph
from export.gru import onnx_grus
from export.operators import OPSET

_EXAMPLE_ROWS, _EXAMPLE_TOKENS, _EXAMPLE_CAPACITY, _EXAMPLE_LOGIT_ROWS = 2, 3, 5, 4


def state_names(prefix: str, num_layers: int) -> list[str]:
    """Return the names of all keys and values, layer by layer: "past.0.key", "past.0.value", ..."""
    return [f"{prefix}.{layer}.{part}" for layer in range(num_layers) for part in ("key", "value")]


def write_onnx(graph: StepGraph, path: Path) -> None:
    """Write `graph` to `path`, and its weights beside it to `path` + ".data"."""
    config = graph.config
    axes = {name: torch.export.Dim(name, min=1) for name in ("rows", "tokens", "capacity", "logit_rows")}
    cache = torch.zeros(_EXAMPLE_ROWS, config.num_kv_heads, _EXAMPLE_CAPACITY, config.head_dim)
    example: tuple[Tensor | list[tuple[Tensor, Tensor]], ...] = (
        torch.zeros(_EXAMPLE_ROWS, _EXAMPLE_TOKENS, dtype=torch.int64),
        torch.full((_EXAMPLE_ROWS,), _EXAMPLE_TOKENS, dtype=torch.int32),
        torch.tensor(_EXAMPLE_CAPACITY, dtype=torch.int32),
        torch.arange(_EXAMPLE_LOGIT_ROWS),
        [(cache.clone(), cache.clone()) for _ in range(config.num_layers)],
    )
    state = {0: axes["rows"], 2: axes["capacity"]}
    shapes = (
        {0: axes["rows"], 1: axes["tokens"]},
        {0: axes["rows"]},
        {},
        {0: axes["logit_rows"]},
        [(state, state) for _ in range(config.num_layers)],
    )
    _write(
        graph,
        path,
        example,
        shapes,
        inputs=["token_ids", "lengths", "total_length", "logits_index", *state_names("past", config.num_layers)],
        outputs=["logits", *state_names("present", config.num_layers)],
    )


def write_encode_graph(graph: EncodeGraph, path: Path) -> None:
    """Write `graph` to `path`, and its weights beside it to `path` + ".data"."""
    rows, tokens = (torch.export.Dim(name, min=1) for name in ("rows", "tokens"))
    example = (
        torch.zeros(_EXAMPLE_ROWS, _EXAMPLE_TOKENS, dtype=torch.int64),
        torch.full((_EXAMPLE_ROWS,), _EXAMPLE_TOKENS, dtype=torch.int32),
    )
    _write(graph, path, example, ({0: rows, 1: tokens}, {0: rows}), inputs=["token_ids", "lengths"], outputs=["hidden"])


def trace(
    graph: nn.Module,
    example: tuple[Any, ...],
    shapes: tuple[Any, ...],
    *,
    inputs: list[str],
    outputs: list[str],
    optimize: bool = True,
    opset: int = OPSET,
    translations: dict[Any, Any] | None = None,
) -> torch.onnx.ONNXProgram:
    """Trace a module on example inputs, whose dynamic axes `shapes` names, and return the ONNX program.

    Without `optimize` tensors stay as the module has them, by its own names. `translations` says what PyTorch's
    exporter does not know: ONNX functions by the operators that they stand for.
    """
    # The exporter tells of every operator of torchvision that it leaves out; there is none in our graphs.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings(), onnx_grus(graph):
        # PyTorch about itself: a deprecated pickle hook, and inputs that share an axis name.
        warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)
        warnings.filterwarnings("ignore", "# The axis name: .* will not be used", UserWarning)
        return torch.onnx.export(
            graph.eval(),
            example,
            dynamo=True,
            opset_version=opset,
            custom_translation_table=translations,
            dynamic_shapes=shapes,
            input_names=inputs,
            output_names=outputs,
            optimize=optimize,
            verbose=False,
        )


def _write(
    graph: nn.Module,
    path: Path,
    example: tuple[Any, ...],
    shapes: tuple[Any, ...],
    inputs: list[str],
    outputs: list[str],
) -> None:
    trace(graph, example, shapes, inputs=inputs, outputs=outputs).save(path, external_data=True)
