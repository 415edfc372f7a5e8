"""PyTorch's own exporter, called in one way for all graphs."""

import logging
import warnings
from typing import Any

import torch
from torch import nn

from export.gru import onnx_grus
from export.operators import OPSET


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
        warnings.filterwarnings("ignore", "# ONNX model has different number of inputs", UserWarning)
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
