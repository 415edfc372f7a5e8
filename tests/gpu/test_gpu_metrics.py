"""What is shown of a GPU that is there."""

import pytest

from service.metrics.gpu import find_gpus


@pytest.mark.gpu
def test_a_device_says_what_it_has(cuda: str) -> None:
    read = find_gpus()
    assert read is not None, "nvidia-ml-py finds no device"
    for gpu in read():
        assert 0 < gpu.used_bytes <= gpu.total_bytes
        assert gpu.utilization_ratio is None or 0 <= gpu.utilization_ratio <= 1
