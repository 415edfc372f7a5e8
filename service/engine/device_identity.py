"""What runs the graphs of this process, as far as it can change a result: a processor or a CUDA device.

The CUDA device is asked of the driver's own library, which counts devices as ONNX Runtime does (`CUDA_VISIBLE_DEVICES`,
parts of a device); its management library, which counts otherwise, tells the driver's version.
"""

import ctypes
import logging
from dataclasses import asdict, dataclass

import onnxruntime

from attendant.processor import processor_features

logger = logging.getLogger(__name__)

_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_NAME_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceIdentity:
    """A kind of device with what drives it; equal ones are taken for one another.

    Args:
        name: of the device, or the processor's architecture and the instruction sets that kernels choose between.
        provider: of ONNX Runtime.
        onnxruntime: its version.
        compute_capability: of a CUDA device, "9.0" for instance; empty for a processor.
        driver: version of a CUDA device's driver; empty for a processor, or if it cannot be told.
    """

    name: str
    provider: str
    onnxruntime: str
    compute_capability: str = ""
    driver: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the fields by name."""
        return asdict(self)


def identify(provider: str, index: int = 0) -> DeviceIdentity:
    """Return what a provider of this process runs on.

    Args:
        provider: "cpu" or "cuda".
        index: of the CUDA device, as CUDA counts them.

    Raises:
        OSError: the CUDA device cannot be asked; the message says why.
    """
    if provider == "cpu":
        return DeviceIdentity(
            name=" ".join(processor_features()),
            provider="CPUExecutionProvider",
            onnxruntime=onnxruntime.__version__,
        )
    name, compute_capability = cuda_device(index)
    return DeviceIdentity(
        name=name,
        provider="CUDAExecutionProvider",
        onnxruntime=onnxruntime.__version__,
        compute_capability=compute_capability,
        driver=_driver_version(),
    )


def cuda_device(index: int = 0) -> tuple[str, str]:
    """Return name and compute capability of a CUDA device.

    Raises:
        OSError: there is no driver, or no such device.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    _call(driver, "cuInit", 0)
    device = ctypes.c_int()
    _call(driver, "cuDeviceGet", ctypes.byref(device), index)
    name = ctypes.create_string_buffer(_NAME_BYTES)
    _call(driver, "cuDeviceGetName", name, _NAME_BYTES, device)
    capability = []
    for attribute in _COMPUTE_CAPABILITY:
        value = ctypes.c_int()
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        capability.append(str(value.value))
    return name.value.decode("utf-8", "replace"), ".".join(capability)


def _call(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    code = library[name](*arguments)
    if code != 0:
        raise OSError(f"{name} of the CUDA driver fails with error {code}")


def _driver_version() -> str:
    try:
        import pynvml  # noqa: PLC0415  # optional: the extra `gpu`
    except ImportError:
        logger.debug("the driver's version is not known: nvidia-ml-py is not installed")
        return ""
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError as error:
        logger.debug("the driver's version is not known: %s", error)
        return ""
