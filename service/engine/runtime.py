"""ONNX Runtime sessions of this process: one shared thread pool, the provider asked for, the tensors declared."""

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from attendant.bundle import GraphSpec, TensorSpec
from service.bundle import BundleRefused
from service.engine.device import Device

CUDA = "CUDAExecutionProvider"
_ATTENTION = 1 | 2 | 16
"""Kernels that attention may take: flash, memory-efficient, and unfused (ONNX Runtime's enum AttentionBackend). Left to
itself it takes cuDNN's on Hopper, which are planned anew for every number of rows and tokens, and keep every plan."""

logger = logging.getLogger(__name__)

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


def create_session(
    directory: Path, graph: GraphSpec, device: Device | None = None, *, captures: bool = False
) -> ort.InferenceSession:
    """Load a graph and compare its real inputs and outputs with the manifest's.

    Args:
        directory: the bundle.
        graph: which of its graphs.
        device: what is to run it, the CPU if None.
        captures: whether runs on a GPU may be captured and replayed as CUDA graphs.

    Raises:
        BundleRefused: the runtime cannot load it, or not on the device, or a tensor is not as declared.
    """
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.enable_mem_pattern = False  # shapes change from step to step
    options.log_severity_level = 3
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if device is not None and device.name == "cuda":
        require_cuda_build(ort.get_available_providers())
        # The arena would take twice what the weights need.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        providers = [(CUDA, cuda_options(device, captures=captures))]
    path = directory / graph.file
    try:
        try:
            session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
        except Exception as error:
            if device is None or device.name != "cuda" or not captures:
                raise
            # A node that only the CPU has a kernel for: slower is better than not at all, but not in silence.
            logger.warning("%s: its runs can not be captured, every kernel is launched alone: %s", path, error)
            providers = [(CUDA, cuda_options(device, captures=False))]
            session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise BundleRefused(f"{graph.file}: ONNX Runtime cannot load it: {error}") from error
    if device is not None and device.name == "cuda":
        require_cuda(session.get_providers())
    _compare(graph, "input", graph.inputs, session.get_inputs())
    _compare(graph, "output", graph.outputs, session.get_outputs())
    return session


def cuda_options(device: Device, *, captures: bool) -> dict[str, str]:
    """Return what ONNX Runtime's CUDA provider is told, in its own words."""
    return {
        "device_id": str(device.index),
        # Copies and graphs in one stream: nobody waits for another stream.
        "user_compute_stream": str(device.stream),
        "enable_cuda_graph": "1" if captures else "0",
        # What is left of the memory belongs to the states.
        "arena_extend_strategy": "kSameAsRequested",
        "sdpa_kernel": str(_ATTENTION),
    }


def require_cuda_build(available: Sequence[str]) -> None:
    """Refuse a build of ONNX Runtime that has no CUDA provider, given those that it has.

    Raises:
        BundleRefused: this is such a build.
    """
    if CUDA not in available:
        raise BundleRefused(
            f"it needs {CUDA}, and this build of ONNX Runtime has {', '.join(available)} only: "
            "install onnxruntime-gpu instead of onnxruntime (the extra gpu instead of cpu)"
        )


def require_cuda(providers: Sequence[str]) -> None:
    """Refuse a session that runs elsewhere than on CUDA: ONNX Runtime falls back to the CPU without a word.

    Raises:
        BundleRefused: CUDA is not the first of the session's providers.
    """
    if providers[0] != CUDA:
        raise BundleRefused(
            f"it needs {CUDA}, and ONNX Runtime runs it with {', '.join(providers)}: the NVIDIA driver, a GPU, or one "
            "of the libraries cuBLAS, cuRAND and the CUDA runtime is missing"
        )


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
