"""What runs a bundle, put together for the processor or for a device: graph, memory, and what chooses tokens."""

import logging
from dataclasses import dataclass
from typing import Any

from attendant.bundle import Check, GraphKind, Manifest
from service.bundle import BundleRefused, FoundBundle
from service.engine.choosing import Chooser, DeviceChooser, HostChooser
from service.engine.cuda_device import CudaDevice
from service.engine.device import Device, DeviceError
from service.engine.device_graph import DeviceGraph, DownloadedGraph
from service.engine.device_sampler import DeviceSampler
from service.engine.graph import Graph, HostGraph
from service.engine.pools import PoolSize, device_slots, free_for_states, pool_size
from service.engine.sampler_self_test import check_sampler
from service.engine.step_graph import StepGraph
from service.scheduling.row_buckets import row_buckets
from service.scheduling.slots import rounded

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Assembly:
    """What runs a bundle.

    Args:
        checked: the graph as load-time checks see it.
        graph: the graph as the engine sees it.
        chooser: chooses tokens from what `graph` says of logits.
        num_slots: rows of the states.
        size: how large those are.
        row_buckets: how many decode rows a step may have; any number if empty.
        checks: what was measured of what is on a device beside the step graph.
    """

    checked: HostGraph
    graph: Graph[Any]
    chooser: Chooser[Any]
    num_slots: int
    size: PoolSize
    row_buckets: tuple[int, ...] = ()
    checks: tuple[Check, ...] = ()


def assemble(
    found: FoundBundle,
    *,
    max_slots: int,
    kv_memory: int | None,
    num_bundles: int = 1,
    device: Device | None = None,
    captures: bool = True,
) -> Assembly:
    """Load what runs a bundle where it was made for.

    Args:
        found: a bundle whose files were verified.
        max_slots: sequences that may run at once.
        kv_memory: bytes for their states; on a device, what its free memory allows if None.
        num_bundles: how many share that.
        device: what runs it; if None, the processor or the GPU, as the bundle says.
        captures: whether a GPU's decode runs are captured and replayed, which come in buckets for that.

    Raises:
        BundleRefused: it does not fit what this build serves, or what this machine has.
        ValueError: `kv_memory` is too small.
    """
    try:
        if device is None and found.manifest.target == "cuda":
            device = CudaDevice()
        if device is not None:
            with device.loading, device.turns.together():
                if kv_memory is None:
                    free, _ = device.memory()
                    kv_memory = free_for_states(free, _weight_bytes(found.manifest), num_bundles)
                return _on_device(found, device, device_slots(found.manifest, max_slots, kv_memory), captures=captures)
    except DeviceError as error:
        raise BundleRefused(str(error)) from error
    assert kv_memory is not None, "the memory of a processor is always given"
    size = pool_size(found.manifest, max_slots, kv_memory)
    graph = StepGraph(found, max_slots, size.capacity)
    return Assembly(graph, graph, HostChooser(graph.vocab_size), max_slots, size)


def _on_device(found: FoundBundle, device: Device, num_slots: int, *, captures: bool) -> Assembly:
    capacity = found.manifest.limits.max_model_len
    buckets = row_buckets(num_slots) if captures else ()
    free, total = (size >> 20 for size in device.memory())
    logger.info(
        "%s: %d slots of %d tokens; %d of the device's %d MiB were free before",
        *(found.manifest.key, num_slots, capacity, free, total),
    )
    graph = DeviceGraph(found, num_slots, capacity, device, buckets)
    sampler = DeviceSampler(found, graph.logits, row_buckets(graph.logits.shape[0]) if captures else ())
    return Assembly(
        checked=DownloadedGraph(graph),
        graph=graph,
        chooser=DeviceChooser(graph, sampler),
        num_slots=num_slots,
        size=PoolSize(capacity, num_slots * rounded(capacity), None),
        row_buckets=buckets,
        checks=check_sampler(sampler, graph.logits),
    )


def _weight_bytes(manifest: Manifest) -> int:
    graph = manifest.graph(GraphKind.STEP)
    names = {graph.file, graph.data} if graph else set()
    return sum(file.bytes for file in manifest.files if file.name in names)
