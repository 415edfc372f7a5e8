"""NVIDIA's GPU as a `Device`, through the CUDA runtime library that ONNX Runtime's GPU build uses itself.

Nothing but calls of that library and the order they go in; each is checked. The device is the first that the process
sees: `CUDA_VISIBLE_DEVICES` chooses another, one replica of the service runs on one.
"""

import ctypes
import importlib.util
import math
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from attendant.bundle import DType
from service.engine.device import Array, Buffer, Device, DeviceError, item_bytes

_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
_NON_BLOCKING = 1  # cudaStreamNonBlocking: the stream does not wait for the default one
_HINTS = {
    2: "give the states less with --kv-memory",  # cudaErrorMemoryAllocation
    35: "the NVIDIA driver is missing, or older than this CUDA runtime asks for",  # cudaErrorInsufficientDriver
    100: "no GPU is here, or CUDA_VISIBLE_DEVICES hides it",  # cudaErrorNoDevice
}
_STAGING_BYTES = 1 << 20
_ALIGNMENT = 64

_ADDRESS, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_SIGNATURES = {
    "cudaGetDeviceCount": (ctypes.POINTER(_INT),),
    "cudaRuntimeGetVersion": (ctypes.POINTER(_INT),),
    "cudaDriverGetVersion": (ctypes.POINTER(_INT),),
    "cudaStreamCreateWithFlags": (ctypes.POINTER(_ADDRESS), ctypes.c_uint),
    "cudaStreamSynchronize": (_ADDRESS,),
    "cudaMemGetInfo": (ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE)),
    "cudaMalloc": (ctypes.POINTER(_ADDRESS), _SIZE),
    "cudaFree": (_ADDRESS,),
    "cudaMallocHost": (ctypes.POINTER(_ADDRESS), _SIZE),
    "cudaFreeHost": (_ADDRESS,),
    "cudaMemsetAsync": (_ADDRESS, _INT, _SIZE, _ADDRESS),
    # destination, source, bytes, kind, stream
    "cudaMemcpyAsync": (_ADDRESS, _ADDRESS, _SIZE, _INT, _ADDRESS),
    # destination, its pitch, source, its pitch, width in bytes, height, kind, stream
    "cudaMemcpy2DAsync": (_ADDRESS, _SIZE, _ADDRESS, _SIZE, _SIZE, _SIZE, _INT, _ADDRESS),
    "cudaEventCreate": (ctypes.POINTER(_ADDRESS),),
    "cudaEventRecord": (_ADDRESS, _ADDRESS),
    "cudaEventElapsedTime": (ctypes.POINTER(ctypes.c_float), _ADDRESS, _ADDRESS),
    "cudaGetLastError": (),
}


class CudaRuntime:
    """The CUDA runtime library; every call's status is looked at.

    Args:
        library: the loaded library.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, _INT
        library.cudaGetErrorString.argtypes, library.cudaGetErrorString.restype = (_INT,), ctypes.c_char_p

    def call(self, name: str, *arguments: object) -> None:
        """Call a function of the library.

        Raises:
            DeviceError: it failed; the message names the call and the cause.
        """
        status = getattr(self._library, name)(*arguments)
        if status:
            # What is not forgotten here, ONNX Runtime would take for an error of its own.
            self._library.cudaGetLastError()
            cause = self._library.cudaGetErrorString(status).decode()
            hint = f": {_HINTS[status]}" if status in _HINTS else ""
            raise DeviceError(f"{name}: {cause} (CUDA error {status}){hint}")

    def number(self, name: str) -> int:
        """Return the only number that a function of the library gives."""
        value = _INT()
        self.call(name, ctypes.byref(value))
        return value.value

    def address(self, name: str, *arguments: int) -> int:
        """Return the address that a function of the library makes."""
        value = _ADDRESS()
        self.call(name, ctypes.byref(value), *arguments)
        assert value.value is not None, name
        return value.value


class _Memory:
    """What one allocation holds; freed with it, unless the process ends first."""

    def __init__(self, runtime: CudaRuntime, size: int) -> None:
        self.address = runtime.address("cudaMalloc", size)
        weakref.finalize(self, _free, runtime, "cudaFree", self.address).atexit = False


def _free(runtime: CudaRuntime, name: str, address: int) -> None:
    with Device.turns.together():  # whoever lets go of memory knows nothing of captures
        runtime.call(name, address)


class CudaDevice(Device):
    """The first GPU that the process sees, with a stream of its own.

    Args:
        runtime: the CUDA runtime library, what `cuda_runtime` finds if None.

    Raises:
        DeviceError: there is no such library, no driver, or no GPU.
    """

    name = "cuda"

    def __init__(self, runtime: CudaRuntime | None = None) -> None:
        self._runtime = runtime or cuda_runtime()
        self._runtime.number("cudaGetDeviceCount")  # fails without any
        # Never destroyed: it is small, and sessions that compute in it may live longer than this object.
        self.stream: int = self._runtime.address("cudaStreamCreateWithFlags", _NON_BLOCKING)
        self._staging = self.host_array((_STAGING_BYTES,), DType.UINT8)
        self._staged = 0

    def versions(self) -> tuple[int, int]:
        """Return the CUDA versions of the runtime library and of the driver: 13000 is 13.0."""
        return self._runtime.number("cudaRuntimeGetVersion"), self._runtime.number("cudaDriverGetVersion")

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """Return zeros on the device."""
        size = math.prod(shape) * item_bytes(dtype)
        memory = _Memory(self._runtime, max(1, size))
        self._runtime.call("cudaMemsetAsync", memory.address, 0, size, self.stream)
        return Buffer(memory.address, shape, dtype, self, memory)

    def host_array(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """Return an array in pinned memory."""
        size = max(1, math.prod(shape) * item_bytes(dtype))
        address = self._runtime.address("cudaMallocHost", size)
        memory = (ctypes.c_char * size).from_address(address)
        weakref.finalize(memory, _free, self._runtime, "cudaFreeHost", address).atexit = False
        array: Array = np.ndarray(shape, dtype.value, memoryview(memory))
        array[...] = 0
        return array

    def _upload(self, array: Array, buffer: Buffer) -> None:
        """Copy through pinned memory, each upload since the last `synchronize` through a part of its own."""
        size, source = array.nbytes, array.ctypes.data
        if size <= _STAGING_BYTES:
            if self._staged + size > _STAGING_BYTES:
                self.synchronize()
            source = self._staging.ctypes.data + self._staged
            ctypes.memmove(source, array.ctypes.data, size)
            self._staged += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._runtime.call("cudaMemcpyAsync", buffer.address, source, size, _TO_DEVICE, self.stream)
        if size > _STAGING_BYTES:
            self.synchronize()

    def _download(self, buffer: Buffer, array: Array) -> None:
        self._runtime.call("cudaMemcpyAsync", array.ctypes.data, buffer.address, array.nbytes, _TO_HOST, self.stream)

    def copy_strided(self, source: int, destination: int, *, pitch: int, width: int, height: int) -> None:
        """Copy on the device, in its stream."""
        self._runtime.call(
            "cudaMemcpy2DAsync", destination, pitch, source, pitch, width, height, _ON_DEVICE, self.stream
        )

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._runtime.call("cudaStreamSynchronize", self.stream)
        self._staged = 0

    def event(self) -> int:
        """Make an event; a process has a few, and keeps them."""
        return self._runtime.address("cudaEventCreate")

    def record(self, event: int) -> None:
        """Record it in the stream."""
        self._runtime.call("cudaEventRecord", event, self.stream)

    def seconds(self, first: int, last: int) -> float:
        """Return what the device measured, to about half a microsecond."""
        milliseconds = ctypes.c_float()
        self._runtime.call("cudaEventElapsedTime", ctypes.byref(milliseconds), first, last)
        return milliseconds.value / 1000

    def memory(self) -> tuple[int, int]:
        """Return the free bytes of the device, and all of them."""
        free, total = _SIZE(), _SIZE()
        self._runtime.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value


@cache
def cuda_runtime() -> CudaRuntime:
    """Load the CUDA runtime library of the version that ONNX Runtime was built for.

    Raises:
        DeviceError: it is not here; the message says where it was looked for.
    """
    ort.preload_dlls()  # does nothing in the CPU build
    major = (ort.cuda_version or "13").partition(".")[0]
    name = f"libcudart.so.{major}"
    tried = []
    for path in (*_wheel_paths(name), name):  # by its name: what is loaded already, or where the system looks
        try:
            return CudaRuntime(ctypes.CDLL(path))
        except OSError as error:
            tried.append(str(error))
    raise DeviceError(
        f"the CUDA runtime library {name} is missing ({'; '.join(tried)}): install the package nvidia-cuda-runtime of "
        f"version {major}, or CUDA {major} itself"
    )


def _wheel_paths(name: str) -> Iterator[str]:
    """Return where NVIDIA's Python packages have a library."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        yield from map(str, sorted(Path(folder).glob(f"*/lib/{name}")))
