"""GPUs are shown where there are any; without a device, a driver or its binding there are no such series."""

import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.engine.device_identity import cuda_device
from service.metrics import ServerMetrics
from service.metrics.gpu import GPU_FAMILIES, GpuCollector, GpuReading, find_gpus


def names(page: str) -> set[str]:
    return {family.name for family in text_string_to_metric_families(page) if "_gpu_" in family.name}


def test_every_device_is_shown_with_what_is_known_of_it() -> None:
    registry = CollectorRegistry()
    registry.register(
        GpuCollector(
            lambda: [
                GpuReading(index=0, name="H200", used_bytes=3 << 30, total_bytes=139 << 30, utilization_ratio=0.75),
                GpuReading(index=1, name="MIG", used_bytes=1, total_bytes=2, utilization_ratio=None),
            ]
        )
    )
    page = generate_latest(registry).decode()
    samples = {
        (sample.name, sample.labels["gpu"]): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    assert samples == {
        ("attendant_gpu_memory_used_bytes", "0"): 3 << 30,
        ("attendant_gpu_memory_total_bytes", "0"): 139 << 30,
        ("attendant_gpu_utilization_ratio", "0"): 0.75,
        ("attendant_gpu_memory_used_bytes", "1"): 1,
        ("attendant_gpu_memory_total_bytes", "1"): 2,
    }
    assert names(page) == {name for name, _, _ in GPU_FAMILIES}


def test_without_a_driver_there_are_no_such_series() -> None:
    if find_gpus() is not None:
        pytest.skip("there is a GPU")
    assert names(generate_latest(ServerMetrics().registry).decode()) == set()


def test_without_the_binding_there_are_no_such_series_and_nothing_fails() -> None:
    script = """
import sys
sys.modules["pynvml"] = None  # how Python itself marks what cannot be imported
from prometheus_client import generate_latest
from service.metrics import ServerMetrics
from service.metrics.gpu import find_gpus
assert find_gpus() is None
assert b"_gpu_" not in generate_latest(ServerMetrics().registry)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.gpu
def test_a_device_says_what_it_has() -> None:
    try:
        cuda_device()
    except OSError as error:
        pytest.skip(f"no CUDA device: {error}")
    read = find_gpus()
    assert read is not None, "nvidia-ml-py finds no device"
    for gpu in read():
        assert 0 < gpu.used_bytes <= gpu.total_bytes
        assert gpu.utilization_ratio is None or 0 <= gpu.utilization_ratio <= 1
