"""What the driver says of a CUDA device, asked of a stand-in (host_cuda.c) where there is none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attendant.processor import processor_features
from service.engine.device_identity import identify

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the stand-in is the driver's library."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: the stand-in for the driver's library can not be built")
    directory = tmp_path_factory.mktemp("cuda")
    source = Path(__file__).with_name("host_cuda.c")
    library = directory / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
    return os.environ | {"LD_LIBRARY_PATH": str(directory), "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"}


def python(code: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_a_cuda_device_is_known_by_its_name_and_capability(environment: dict[str, str]) -> None:
    code = (
        "from service.engine.device_identity import identify; device = identify('cuda'); "
        "print(device.name, device.compute_capability, device.provider, device.onnxruntime, sep='|')"
    )
    import onnxruntime

    assert python(code, environment) == f"Stand-in 3000|12.1|CUDAExecutionProvider|{onnxruntime.__version__}"


def test_a_device_that_is_not_there_is_named_in_the_error(environment: dict[str, str]) -> None:
    code = (
        "from service.engine.device_identity import cuda_device\n"
        "try:\n    cuda_device(3)\nexcept OSError as error:\n    print(error)"
    )
    assert python(code, environment) == "cuDeviceGet of the CUDA driver fails with error 101"


def test_a_processor_is_known_by_what_its_kernels_choose_between() -> None:
    device = identify("cpu")
    assert device.name.split() == list(processor_features())
    assert (device.provider, device.compute_capability, device.driver) == ("CPUExecutionProvider", "", "")


def test_the_gpu_suite_fails_where_a_device_is_and_onnx_runtime_is_the_cpu_build(environment: dict[str, str]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime is the GPU build")
    suite = "tests/gpu/test_serving.py::test_the_memory_of_a_device_returns_when_the_server_ends"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", suite]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert "Stand-in 3000 is here, but the onnxruntime" in done.stdout
    assert "CPU build" in done.stdout
    assert "NOTHING WAS TESTED" not in done.stdout
