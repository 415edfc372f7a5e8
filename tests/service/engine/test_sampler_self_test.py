"""The load-time test of a device's sampler passes where it works, and finds what is broken."""

import shutil
from pathlib import Path

import onnx
import pytest

from attendant.bundle import DType, Manifest
from export.sampler import sampler_graphs
from service.bundle import BundleRefused, FoundBundle
from service.engine.device import HostDevice
from service.engine.device_sampler import DeviceSampler
from service.engine.runtime import use_threads
from service.engine.sampler_self_test import check_sampler

V = 5003


def checked(directory: Path, num_rows: int) -> list[str]:
    use_threads(2)  # as all tests of this process do: the first decides
    found = FoundBundle(directory, Manifest.model_construct(graphs=sampler_graphs(V)), "")
    logits = HostDevice().allocate((num_rows, V), DType.FLOAT32)
    return [check.name for check in check_sampler(DeviceSampler(found, logits), logits)]


@pytest.mark.parametrize("num_rows", [1, 6, 40])
def test_a_sound_sampler_passes_with_any_number_of_rows(sampler_directory: Path, num_rows: int) -> None:
    assert len(checked(sampler_directory, num_rows)) == 9


@pytest.mark.parametrize(
    ("kind", "operator", "wrong", "what"),
    [
        ("sample", "Exp", "Sigmoid", "no filters"),
        ("sample", "ReduceMin", "ReduceMax", "penalties and bias|no filters|greedy"),
        ("sample_filtered", "CumSum", "Identity", "top_k"),
        ("logprobs", "Log", "Sqrt", "log-probabilities"),
    ],
)
def test_a_wrong_kernel_is_found(
    sampler_directory: Path, tmp_path: Path, kind: str, operator: str, wrong: str, what: str
) -> None:
    shutil.copytree(sampler_directory, tmp_path, dirs_exist_ok=True)
    model = onnx.load(tmp_path / f"{kind}.onnx")
    for node in model.graph.node:
        if node.op_type == operator:
            node.op_type = wrong
            if wrong == "Identity":
                del node.input[1:], node.attribute[:]
    onnx.save(model, tmp_path / f"{kind}.onnx")
    with pytest.raises(BundleRefused, match=what):
        checked(tmp_path, 6)
