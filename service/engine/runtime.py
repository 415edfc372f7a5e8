"""ONNX Runtime sessions of this process: one shared thread pool, the provider asked for, the tensors declared."""

from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from attendant.bundle import GraphSpec, TensorSpec
from service.bundle import BundleRefused

_NUMPY_NAME = {
    "tensor(double)": "float64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


@cache
def use_threads(num_threads: int) -> None:
    """Fix the size of the thread pool that every session of this process shares; the first call decides."""
    ort.set_global_thread_pool_sizes(num_threads, 1)


def create_session(directory: Path, graph: GraphSpec) -> ort.InferenceSession:
    """Load a graph on the CPU and compare its real inputs and outputs with the manifest's.

    Raises:
        BundleRefused: the runtime cannot load it, or a tensor is not as declared.
    """
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.enable_mem_pattern = False  # shapes change from step to step
    options.log_severity_level = 3
    path = directory / graph.file
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise BundleRefused(f"{graph.file}: ONNX Runtime cannot load it: {error}") from error
    _compare(graph, "input", graph.inputs, session.get_inputs())
    _compare(graph, "output", graph.outputs, session.get_outputs())
    return session


def _compare(graph: GraphSpec, kind: str, declared: tuple[TensorSpec, ...], real: list[ort.NodeArg]) -> None:
    by_name = {node.name: node for node in real}
    if set(by_name) != {tensor.name for tensor in declared}:
        difference = sorted(set(by_name) ^ {tensor.name for tensor in declared})
        raise BundleRefused(f"{graph.file}: {kind}s differ from the manifest: {difference}")
    for tensor in declared:
        node = by_name[tensor.name]
        if _NUMPY_NAME.get(node.type) != tensor.dtype.value:
            raise BundleRefused(f"{graph.file}: {kind} {tensor.name} is {node.type}, the manifest says {tensor.dtype}")
        fixed = [axis if isinstance(axis, int) else None for axis in tensor.axes]
        real_axes = [axis if isinstance(axis, int) else None for axis in node.shape]
        same = len(fixed) == len(real_axes) and all(
            wanted is None or found is None or wanted == found for wanted, found in zip(fixed, real_axes, strict=True)
        )
        if not same:
            raise BundleRefused(f"{graph.file}: {kind} {tensor.name} is {node.shape}, the manifest says {tensor.axes}")


def element_type(tensor: TensorSpec) -> np.dtype[np.generic]:
    """Return the numpy dtype of a tensor; bfloat16 has none and needs CUDA."""
    return np.dtype(tensor.dtype.value)
