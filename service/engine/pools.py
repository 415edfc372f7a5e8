"""Memory for what sequences remember: one pool per `append` state, one row per slot.

A pool is anonymous private memory that is committed page by page as positions are written and can be given back slot by
slot. (numpy's own allocations ask for huge pages and commit three to five times as much.)

Axes: slots S, positions capacity C, the state's other axes as the manifest has them.
"""

import math
import mmap
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import CAPACITY, Manifest, StateRule, StateSpec
from service.scheduling.slots import PAGE_POSITIONS, rounded

# The golden run and the self-test need rows of this length.
_CHECKED_POSITIONS = 256
_MAP_NORESERVE = 0x4000  # Linux: address space is not counted as memory


class StatePool:
    """One `append` state of all slots.

    Args:
        spec: the state; its axes are ("rows", ..., "capacity", ...).
        num_slots: S.
        capacity: C.
    """

    def __init__(self, spec: StateSpec, num_slots: int, capacity: int) -> None:
        self.spec = spec
        self.slot_shape = tuple(capacity if axis == CAPACITY else int(axis) for axis in spec.axes[1:])
        self._position_axis = spec.axes.index(CAPACITY)
        dtype = np.dtype(spec.dtype.value)
        self.slot_bytes = math.prod(self.slot_shape) * dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._memory = mmap.mmap(-1, num_slots * self.slot_bytes, flags=flags)
        self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.array: NDArray[np.generic] = np.frombuffer(self._memory, dtype).reshape(num_slots, *self.slot_shape)

    def address(self, slot: int) -> int:
        """Return where the slot's row begins; rows follow each other."""
        return int(self.array.ctypes.data) + slot * self.slot_bytes

    def copy(self, source: int, destination: int, length: int) -> None:
        """Copy positions [0, length) of one slot to another."""
        positions = (slice(None),) * (self._position_axis - 1) + (slice(0, length),)
        self.array[destination][positions] = self.array[source][positions]

    def release(self, slot: int) -> None:
        """Give a slot's whole pages back to the system; they read as zeros afterwards."""
        page = mmap.PAGESIZE
        start = -(-slot * self.slot_bytes // page) * page
        end = (slot + 1) * self.slot_bytes // page * page
        if end > start:
            self._memory.madvise(mmap.MADV_DONTNEED, start, end - start)


@dataclass(frozen=True, slots=True)
class PoolSize:
    """How large pools may be: `capacity` positions a slot and `budget` positions over all slots."""

    capacity: int
    budget: int
    bytes_per_position: int


def pool_size(manifest: Manifest, kv_memory: int) -> PoolSize:
    """Divide `kv_memory` bytes into positions; a slot never needs more than the model's own limit.

    Raises:
        ValueError: the memory does not hold the load-time checks.
    """
    per_position = sum(
        math.prod(axis for axis in state.axes if isinstance(axis, int)) * np.dtype(state.dtype.value).itemsize
        for state in manifest.states
        if state.rule is StateRule.APPEND
    )
    budget = kv_memory // per_position // PAGE_POSITIONS * PAGE_POSITIONS
    least = min(_CHECKED_POSITIONS, rounded(manifest.limits.max_model_len))
    if budget < least:
        raise ValueError(f"kv_memory is {kv_memory} bytes, must be at least {least * per_position} for {manifest.key}")
    return PoolSize(min(manifest.limits.max_model_len, budget), budget, per_position)
