"""Memory of a device: pointer arithmetic against numpy's slicing, and the order in which things happen.

The same tests run on the host's memory and on `CudaDevice` over a stand-in for NVIDIA's library (host_cudart.c), which
does everything as late as CUDA may.
"""

import ctypes
import gc
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from attendant.bundle import DType
from service.engine.cuda_device import CudaDevice, CudaRuntime
from service.engine.device import Device, DeviceError, HostDevice


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> CudaRuntime:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: the stand-in for the CUDA runtime library can not be built")
    library = tmp_path_factory.mktemp("cudart") / "libcudart.so"
    source = Path(__file__).with_name("host_cudart.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
    return CudaRuntime(ctypes.CDLL(str(library)))


@pytest.fixture(params=["host", "cuda"])
def device(request: pytest.FixtureRequest) -> Device:
    return HostDevice() if request.param == "host" else CudaDevice(request.getfixturevalue("stand_in"))


def read(device: Device, buffer) -> np.ndarray:
    array = device.host_array(buffer.shape, buffer.dtype)
    device.download(buffer, array)
    device.synchronize()
    return array


def test_fresh_memory_is_zero(device: Device) -> None:
    assert not read(device, device.allocate((3, 5), DType.INT32)).any()


def test_slices_of_rows_are_those_of_numpy(device: Device) -> None:
    numbers = np.random.default_rng(0)
    array = numbers.standard_normal((7, 2, 5, 3)).astype(np.float32)
    buffer = device.allocate(array.shape, DType.FLOAT32)
    device.upload(array, buffer)
    for start in range(8):
        for stop in range(start, 8):
            view = buffer[start:stop]
            assert view.shape == array[start:stop].shape
            assert (read(device, view) == array[start:stop]).all()
            assert (read(device, view[1:]) == array[start:stop][1:]).all()
    changed = numbers.standard_normal((2, 2, 5, 3)).astype(np.float32)
    device.upload(changed, buffer[3:5])
    array[3:5] = changed
    assert (read(device, buffer) == array).all()


def test_half_types_are_told_apart_by_their_onnx_numbers(device: Device) -> None:
    assert device.allocate((2, 3), DType.BFLOAT16).element_type == 16
    assert device.allocate((2, 3), DType.FLOAT16).element_type is np.float16
    assert device.allocate((2, 3), DType.BFLOAT16).nbytes == 12


def test_an_array_may_be_written_again_as_soon_as_it_was_uploaded(device: Device) -> None:
    array = np.zeros((1000,), np.int64)
    buffers = [device.allocate((1000,), DType.INT64) for _ in range(300)]  # more than one lot of pinned memory
    for number, buffer in enumerate(buffers):
        array[:] = number
        device.upload(array, buffer)
    array[:] = -1
    assert [int(read(device, buffer)[999]) for buffer in buffers] == list(range(300))


def test_uploads_of_any_size_arrive(device: Device) -> None:
    for size in (1, 63, 1 << 20, (1 << 20) + 1, 3 << 20):
        array = np.random.default_rng(size).integers(0, 255, size, np.uint8)
        buffer = device.allocate((size,), DType.UINT8)
        device.upload(array, buffer)
        assert (read(device, buffer) == array).all(), size


def test_a_download_holds_nothing_before_the_device_is_waited_for(device: Device) -> None:
    buffer = device.allocate((4,), DType.FLOAT32)
    device.upload(np.ones(4, np.float32), buffer)
    array = device.host_array((4,), DType.FLOAT32)
    device.download(buffer, array)
    device.upload(np.full(4, 2, np.float32), buffer)  # behind it in the stream
    assert not (array == 1).any()
    device.synchronize()
    assert (array == 1).all()


def test_strided_copies_are_those_of_numpy(device: Device) -> None:
    numbers = np.random.default_rng(1)
    for _ in range(30):
        slots, heads, capacity, width = numbers.integers(2, 6, 4)
        array = numbers.standard_normal((slots, heads, capacity, width)).astype(np.float32)
        buffer = device.allocate(array.shape, DType.FLOAT32)
        device.upload(array, buffer)
        source, destination = numbers.choice(slots, 2, replace=False)
        length = int(numbers.integers(1, capacity + 1))
        device.copy_strided(
            buffer[source : source + 1].address,
            buffer[destination : destination + 1].address,
            pitch=int(capacity * width) * 4,
            width=int(length * width) * 4,
            height=int(heads),
        )
        array[destination][:, :length] = array[source][:, :length]
        assert (read(device, buffer) == array).all()


def test_a_slice_keeps_the_memory_of_the_whole(device: Device) -> None:
    buffer = device.allocate((4, 8), DType.FLOAT32)
    device.upload(np.arange(32, dtype=np.float32).reshape(4, 8), buffer)
    row = buffer[3:4]
    del buffer
    gc.collect()
    others = [device.allocate((4, 8), DType.FLOAT32) for _ in range(20)]
    assert (read(device, row)[0] == np.arange(24, 32)).all()
    del others


def test_memory_of_the_device_comes_back_with_its_last_slice(stand_in: CudaRuntime) -> None:
    device = CudaDevice(stand_in)
    gc.collect()
    before = device.memory()[0]
    buffer = device.allocate((1 << 20,), DType.UINT8)
    row = buffer[:1]
    assert device.memory()[0] == before - (1 << 20)
    del buffer
    assert device.memory()[0] == before - (1 << 20)
    del row
    assert device.memory()[0] == before


def test_too_much_is_refused_with_the_call_the_cause_and_what_to_do(stand_in: CudaRuntime) -> None:
    device = CudaDevice(stand_in)
    with pytest.raises(DeviceError, match=r"cudaMalloc: out of memory \(CUDA error 2\): .*--kv-memory"):
        device.allocate((1 << 30,), DType.UINT8)
    assert not read(device, device.allocate((8,), DType.INT32)).any()  # and nothing else is lost


def test_time_on_the_device_is_that_between_two_events(stand_in: CudaRuntime) -> None:
    device = CudaDevice(stand_in)
    buffer = device.allocate((4,), DType.INT32)
    first, last = device.event(), device.event()
    device.record(first)
    for _ in range(3):
        device.upload(np.zeros(4, np.int32), buffer)
    device.record(last)
    with pytest.raises(DeviceError, match="cudaEventElapsedTime"):
        device.seconds(first, last)
    device.synchronize()
    assert device.seconds(first, last) == pytest.approx(3e-3)


def test_time_never_runs_backwards(device: Device) -> None:
    first, last = device.event(), device.event()
    device.record(first)
    device.record(last)
    device.synchronize()
    assert device.seconds(first, last) >= 0


def test_a_machine_without_a_gpu_says_what_is_missing() -> None:
    try:
        device = CudaDevice()
    except DeviceError as error:
        assert any(word in str(error) for word in ("libcudart", "driver", "GPU"))
    else:
        assert device.memory()[1] > 0
