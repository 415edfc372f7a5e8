"""Memory and utilisation of the GPUs, asked of the driver whenever somebody scrapes.

The driver's library comes with the driver, and its Python binding with the extra `gpu`. Where either is missing, or
there is no device, there are no such series.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """One device now; `utilization_ratio` is the share of the last moments in which it computed, None if unknown."""

    index: int
    name: str
    used_bytes: int
    total_bytes: int
    utilization_ratio: float | None


ReadGpus = Callable[[], Sequence[GpuReading]]


class GpuCollector(Collector):
    """Shows what a reading of the devices says.

    Args:
        read: called at each scrape, on the scraping thread.
    """

    def __init__(self, read: ReadGpus) -> None:
        self._read = read

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Name the families without a look at the devices."""
        labels = ("gpu", "name")
        for name, text, unit in GPU_FAMILIES:
            yield GaugeMetricFamily(name, text, labels=labels, unit=unit)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read every device once."""
        used, total, utilization = self.describe()
        for gpu in self._read():
            labels = (str(gpu.index), gpu.name)
            used.add_metric(labels, gpu.used_bytes)
            total.add_metric(labels, gpu.total_bytes)
            if gpu.utilization_ratio is not None:
                utilization.add_metric(labels, gpu.utilization_ratio)
        yield from (used, total, utilization)


GPU_FAMILIES = (
    ("attendant_gpu_memory_used_bytes", "Memory of the device that is in use, by whomever.", "bytes"),
    ("attendant_gpu_memory_total_bytes", "Memory of the device.", "bytes"),
    ("attendant_gpu_utilization_ratio", "Share of the last moments in which the device computed.", "ratio"),
)


def find_gpus() -> ReadGpus | None:
    """Return what reads the devices, or None where there is nothing to read."""
    try:
        import pynvml  # noqa: PLC0415  # optional: the extra `gpu`
    except ImportError:
        logger.debug("no GPU metrics: nvidia-ml-py is not installed")
        return None
    try:
        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        names = [str(pynvml.nvmlDeviceGetName(device)) for device in devices]
    except pynvml.NVMLError as error:
        logger.debug("no GPU metrics: %s", error)
        return None

    def read() -> list[GpuReading]:
        readings = []
        for index, (device, name) in enumerate(zip(devices, names, strict=True)):
            try:
                memory = pynvml.nvmlDeviceGetMemoryInfo(device)
            except pynvml.NVMLError as error:
                logger.debug("GPU %d cannot be read: %s", index, error)
                continue
            try:
                busy = pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
            except pynvml.NVMLError:  # a part of a device has none
                busy = None
            readings.append(
                GpuReading(
                    index=index,
                    name=name,
                    used_bytes=memory.used,
                    total_bytes=memory.total,
                    utilization_ratio=busy,
                )
            )
        return readings

    return read if devices else None
