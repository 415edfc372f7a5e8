"""Which decode runs are captured as CUDA graphs, under which number, and in which order that is done.

A captured run is replayed at its own addresses and shape, so there is one for each number of rows that a decode run may
have, all of them from slot 0. Captured before anything is served, the largest first: what it needs of scratch memory
serves the smaller ones. Memory must not be allocated while a run is captured, so each size runs twice before.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnxruntime as ort

from service.engine.device import Device

EAGER = -1
"""What ONNX Runtime's run option `gpu_graph_id` calls a run that is neither captured nor replayed; 0 is its own."""

_WARM_UPS = 2


def captured_ids(buckets: Sequence[int]) -> dict[int, int]:
    """Return the number of the captured run for each size, which are distinct and positive."""
    return {num_rows: index + 1 for index, num_rows in enumerate(buckets)}


def warm_up(buckets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Return the runs that capture every size, in order: rows, and number."""
    ids = captured_ids(buckets)
    for num_rows in sorted(ids, reverse=True):
        yield from [(num_rows, EAGER)] * _WARM_UPS
        yield num_rows, ids[num_rows]


@contextmanager
def turn(device: Device, graph_id: int) -> Iterator[None]:
    """Hold what a run of `warm_up` needs: a capture is made alone, and memory is not given back meanwhile either."""
    if graph_id == EAGER:
        with device.turns.together():
            yield
        return
    with device.turns.alone():
        was_collecting = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_collecting:
                gc.enable()


def run_options(graph_id: int) -> ort.RunOptions:
    """Return what a run is told: its number, and not to wait for the device."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    # The one who reads the answer waits for it.
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options
