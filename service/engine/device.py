"""Where states, tokens and logits lie: memory of a device, by address, and what can be done with it.

The graphs' code sees `Device` and `Buffer` alone. `HostDevice` keeps everything in this process's memory, so that all
that is done for a GPU runs, and is proved, on a machine without one; `CudaDevice` (cuda_device.py) is the real thing.

Everything happens in the order in which it was asked for, in the device's one stream, which ONNX Runtime computes in
too. Nothing that was asked for need have happened before `synchronize`.
"""

import ctypes
import math
import mmap
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import DType
from service.engine.turns import Turns

Array = NDArray[Any]

_ITEM_BYTES = {
    DType.FLOAT64: 8,
    DType.FLOAT32: 4,
    DType.FLOAT16: 2,
    DType.BFLOAT16: 2,
    DType.INT8: 1,
    DType.UINT8: 1,
    DType.INT32: 4,
    DType.INT64: 8,
    DType.BOOL: 1,
}
_ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16: numpy has no such type


class DeviceError(RuntimeError):
    """The device cannot be used, or refused what was asked of it; the message says what, and what to do."""


def item_bytes(dtype: DType) -> int:
    """Return the bytes of one element."""
    return _ITEM_BYTES[dtype]


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """A tensor in a device's memory, its elements one behind the other.

    `memory` is whatever keeps the address valid: a slice keeps the whole alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: DType
    device: "Device"
    memory: object = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * item_bytes(self.dtype)

    @property
    def element_type(self) -> Any:
        """What ONNX Runtime's bindings take for its dtype: a numpy type, or ONNX's number of one numpy lacks."""
        return _ONNX_BFLOAT16 if self.dtype is DType.BFLOAT16 else np.dtype(self.dtype.value).type

    def __getitem__(self, rows: slice) -> "Buffer":
        """Return consecutive entries of the first axis, which share this buffer's memory."""
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1 and start <= stop, (rows, self.shape)
        row_bytes = math.prod(self.shape[1:]) * item_bytes(self.dtype)
        shape = (stop - start, *self.shape[1:])
        return Buffer(self.address + start * row_bytes, shape, self.dtype, self.device, self.memory)

    def reshaped(self, *shape: int) -> "Buffer":
        """Return the same memory with other axes."""
        assert math.prod(shape) == math.prod(self.shape), (self.shape, shape)
        return Buffer(self.address, shape, self.dtype, self.device, self.memory)


class Device(ABC):
    """Memory and one stream of work. Not thread-safe.

    `name` and `index` are what ONNX Runtime's bindings know the device by, `stream` the address of the stream to
    compute in, if there are any. `loading` is held by whoever loads a bundle, by what memory is free then. All that
    use devices of this process do so in `turns`: together, but alone to capture a run.
    """

    name: str
    index: int = 0
    stream: int | None = None
    loading = threading.Lock()
    turns = Turns()

    @abstractmethod
    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """Return memory of zeros, so that what was never written can not be NaN; it is freed with its last slice.

        Raises:
            DeviceError: there is not so much left.
        """

    @abstractmethod
    def host_array(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """Return zeros in memory of the host that the device reaches fastest; nothing of bfloat16."""

    def upload(self, array: Array, buffer: Buffer) -> None:
        """Copy a whole array of the host into a buffer of its size; the array may be written again at once."""
        assert array.flags.c_contiguous and array.nbytes == buffer.nbytes, (array.shape, array.dtype, buffer)
        self._upload(array, buffer)

    def download(self, buffer: Buffer, array: Array) -> None:
        """Copy a whole buffer into an array of the host, which holds it after `synchronize`."""
        assert array.flags.c_contiguous and array.nbytes == buffer.nbytes, (array.shape, array.dtype, buffer)
        self._download(buffer, array)

    def copy(self, source: Buffer, destination: Buffer) -> None:
        """Copy a buffer to another of its size, which it does not overlap."""
        assert source.nbytes == destination.nbytes, (source, destination)
        self.copy_strided(source.address, destination.address, pitch=source.nbytes, width=source.nbytes, height=1)

    @abstractmethod
    def copy_strided(self, source: int, destination: int, *, pitch: int, width: int, height: int) -> None:
        """Copy `height` pieces of `width` bytes, `pitch` bytes apart, between addresses of the device.

        The two do not overlap.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all that was asked for has happened.

        Raises:
            DeviceError: something of it failed.
        """

    @abstractmethod
    def event(self) -> Any:
        """Return something to `record`, as often as wanted."""

    @abstractmethod
    def record(self, event: Any) -> None:
        """Have the device note the time when it has done all that was asked for so far."""

    @abstractmethod
    def seconds(self, first: Any, last: Any) -> float:
        """Return the time between two events, both of which must have been waited for."""

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Return how many bytes are free, and how many there are."""

    @abstractmethod
    def _upload(self, array: Array, buffer: Buffer) -> None: ...

    @abstractmethod
    def _download(self, buffer: Buffer, array: Array) -> None: ...


class HostDevice(Device):
    """A device made of this process's memory.

    What is downloaded arrives with `synchronize`, and holds nonsense before, so that whoever reads too early is found
    out without a GPU.
    """

    name = "cpu"

    def __init__(self) -> None:
        self._arriving: list[tuple[Array, bytes]] = []

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """Return anonymous memory, which is zero and committed as it is written."""
        size = max(1, math.prod(shape) * item_bytes(dtype))
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return Buffer(ctypes.addressof(ctypes.c_char.from_buffer(memory)), shape, dtype, self, memory)

    def host_array(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """Return an ordinary array."""
        return np.zeros(shape, dtype.value)

    def _upload(self, array: Array, buffer: Buffer) -> None:
        ctypes.memmove(buffer.address, array.ctypes.data, array.nbytes)

    def _download(self, buffer: Buffer, array: Array) -> None:
        self._arriving.append((array, ctypes.string_at(buffer.address, buffer.nbytes)))
        ctypes.memset(array.ctypes.data, 0xFF, array.nbytes)  # NaN, or -1

    def copy_strided(self, source: int, destination: int, *, pitch: int, width: int, height: int) -> None:
        """Copy piece by piece."""
        for offset in range(0, height * pitch, pitch):
            ctypes.memmove(destination + offset, source + offset, width)

    def synchronize(self) -> None:
        """Let what was downloaded arrive."""
        for array, content in self._arriving:
            ctypes.memmove(array.ctypes.data, content, len(content))
        self._arriving.clear()

    def event(self) -> list[float]:
        """Return a place for a time."""
        return [0.0]

    def record(self, event: list[float]) -> None:
        """Note the time: what was asked for is done, but for downloads."""
        event[0] = time.perf_counter()

    def seconds(self, first: list[float], last: list[float]) -> float:
        """Subtract."""
        return last[0] - first[0]

    def memory(self) -> tuple[int, int]:
        """Return the machine's memory that is available, and all of it."""
        with open("/proc/meminfo", encoding="ascii") as stream:
            sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in stream)}
        return sizes["MemAvailable"], sizes["MemTotal"]
