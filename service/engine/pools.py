"""Memory for what sequences remember: one pool per state, one row per slot, and the rule that governs it.

Pools that are as long as sequences are anonymous private memory, committed page by page as it is written, that can be
given back slot by slot. (numpy's own allocations ask for huge pages and commit three to five times as much.)

Axes: slots S, positions capacity C, the state's other axes as the manifest has them.
"""

import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import CAPACITY, SOURCE, Manifest, StateRule, StateSpec
from service.engine.device import item_bytes
from service.scheduling.slots import PAGE_POSITIONS, rounded

Array = NDArray[np.generic]

# The golden run and the self-test need rows of this length.
_CHECKED_POSITIONS = 256
_STATES_SHARE = 0.85
_MAP_NORESERVE = 0x4000  # Linux: address space is not counted as memory


class StatePool:
    """One state of all slots; a subclass obeys its rule. `array` is what a step reads, [S, ...].

    Args:
        spec: the state.
        array: [S, ...], the memory.
    """

    def __init__(self, spec: StateSpec, array: Array) -> None:
        self.spec = spec
        self.array = array

    def present(self, rows: slice) -> Array:
        """Return where a step writes the state of some slots."""
        return self.array[rows]

    def begin(self, slot: int, made: Array | None, source_length: int) -> None:
        """Begin a sequence, with what an encode graph made for it, if it did, of a source so long."""

    def commit(self, slots: Sequence[int]) -> None:
        """Accept what a step wrote for these slots."""

    def copy(self, source: int, destination: int, length: int) -> None:
        """Copy the state of a sequence of `length` positions from slot to slot."""
        self.array[destination] = self.array[source]

    def trim(self, slot: int, length: int) -> None:
        """Give memory back that a sequence of `length` positions never reads again."""

    def release(self, slot: int) -> None:
        """Give the memory of a slot back to the system."""


class AppendPool(StatePool):
    """Positions that are written once, in place; the ones behind a window are given back as the sequence grows.

    Args:
        spec: the state; its axes are ("rows", ..., "capacity", ...).
        num_slots: S.
        capacity: C.
    """

    def __init__(self, spec: StateSpec, num_slots: int, capacity: int) -> None:
        self.slot_shape = tuple(capacity if axis == CAPACITY else int(axis) for axis in spec.axes[1:])
        self._pages = _Pages(num_slots, self.slot_shape, spec)
        super().__init__(spec, self._pages.array)
        position_axis = spec.axes.index(CAPACITY) - 1
        self._before = (slice(None),) * position_axis
        self._position_bytes = position_bytes(spec)
        self._regions = range(0, self._pages.slot_bytes, capacity * self._position_bytes)
        self._trimmed = [0] * num_slots

    def begin(self, slot: int, made: Array | None, source_length: int) -> None:
        """Begin a sequence, which has nothing to remember yet."""
        assert made is None, self.spec.name
        self._trimmed[slot] = 0

    def copy(self, source: int, destination: int, length: int) -> None:
        """Copy positions [0, length) of one slot to another, as far as they may still be read."""
        start = max(0, length - self.spec.window) if self.spec.window else 0
        positions = (*self._before, slice(start, length))
        self.array[destination][positions] = self.array[source][positions]
        self._trimmed[destination] = self._trimmed[source]

    def trim(self, slot: int, length: int) -> None:
        """Give back the whole pages behind the window of a sequence of `length` positions."""
        if self.spec.window is None or length - self.spec.window - self._trimmed[slot] < PAGE_POSITIONS:
            return
        end = length - self.spec.window
        for region in self._regions:
            offset = slot * self._pages.slot_bytes + region
            page_of_last = (offset + self._trimmed[slot] * self._position_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            self._pages.release(max(offset, page_of_last), offset + end * self._position_bytes)
        self._trimmed[slot] = end

    def release(self, slot: int) -> None:
        """Give a slot's whole pages back to the system; they read as zeros afterwards."""
        self._pages.release_slot(slot)


class ReplacePool(StatePool):
    """A state that each step makes anew, in a second buffer: nothing is lost if the step fails, or was nobody's.

    Args:
        spec: the state, of the rule `replace` or `ring`.
        num_slots: S.
    """

    def __init__(self, spec: StateSpec, num_slots: int) -> None:
        shape = (num_slots, *(int(axis) for axis in spec.axes[1:]))
        super().__init__(spec, np.zeros(shape, spec.dtype.value))
        self._next = np.zeros_like(self.array)

    def present(self, rows: slice) -> Array:
        """Return the second buffer: a graph may read a state again after it wrote its successor."""
        return self._next[rows]

    def begin(self, slot: int, made: Array | None, source_length: int) -> None:
        """Begin a sequence with what was made for it, or with zeros."""
        self.array[slot] = 0 if made is None else made

    def commit(self, slots: Sequence[int]) -> None:
        """Let the next step read what this one wrote, for these slots."""
        first, last = min(slots), max(slots)
        if len(slots) == last - first + 1:
            self.array[first : last + 1] = self._next[first : last + 1]
        else:
            self.array[list(slots)] = self._next[list(slots)]


class FixedPool(StatePool):
    """A state that is made once for a sequence and only read; what lies behind its row's own source is zero.

    Args:
        spec: the state; an axis "source" is as long as the longest source.
        num_slots: S.
        source_capacity: positions of the longest source.
    """

    def __init__(self, spec: StateSpec, num_slots: int, source_capacity: int) -> None:
        shape = tuple(source_capacity if axis == SOURCE else int(axis) for axis in spec.axes[1:])
        self._pages = _Pages(num_slots, shape, spec)
        super().__init__(spec, self._pages.array)

    def begin(self, slot: int, made: Array | None, source_length: int) -> None:
        """Begin a sequence with what was made of its source, which may have been padded."""
        assert made is not None, self.spec.name
        real = tuple(slice(source_length if axis == SOURCE else None) for axis in self.spec.axes[1:])
        self.array[slot] = 0
        self.array[slot][real] = made[real]

    def release(self, slot: int) -> None:
        """Give a slot's whole pages back to the system; they read as zeros afterwards."""
        self._pages.release_slot(slot)


class _Pages:
    """Memory of all slots, [S, *slot_shape], that is committed as it is written and can be given back in pages."""

    def __init__(self, num_slots: int, slot_shape: tuple[int, ...], spec: StateSpec) -> None:
        dtype = np.dtype(spec.dtype.value)
        self.slot_bytes = math.prod(slot_shape) * dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._memory = mmap.mmap(-1, num_slots * self.slot_bytes, flags=flags)
        self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.array: Array = np.frombuffer(self._memory, dtype).reshape(num_slots, *slot_shape)

    def release(self, start: int, end: int) -> None:
        """Give back the whole pages between two bytes."""
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)

    def release_slot(self, slot: int) -> None:
        """Give back the whole pages of a slot."""
        self.release(slot * self.slot_bytes, (slot + 1) * self.slot_bytes)


def make_pool(spec: StateSpec, num_slots: int, capacity: int, source_capacity: int) -> StatePool:
    """Return the pool that obeys a state's rule."""
    if spec.rule is StateRule.APPEND:
        return AppendPool(spec, num_slots, capacity)
    if spec.rule is StateRule.FIXED:
        return FixedPool(spec, num_slots, source_capacity)
    return ReplacePool(spec, num_slots)


def source_capacity(manifest: Manifest) -> int:
    """Return how many positions of a source the states are bound at, whatever is real: a multiple of 16.

    Sums over one shape always are the same bits alone and in a batch; over exact lengths they would differ in the last.
    """
    return rounded(manifest.limits.max_source_len or 0)


def position_bytes(spec: StateSpec) -> int:
    """Return the distance of two positions of an `append` state."""
    return _elements(spec.axes[spec.axes.index(CAPACITY) + 1 :], 0) * item_bytes(spec.dtype)


@dataclass(frozen=True, slots=True)
class PoolSize:
    """How large pools may be.

    Args:
        capacity: positions of a slot.
        budget: positions of all slots together that are in memory at once.
        window: positions of a slot behind the last that stay in memory, or None where all do.
    """

    capacity: int
    budget: int
    window: int | None


def pool_size(manifest: Manifest, num_slots: int, kv_memory: int) -> PoolSize:
    """Divide `kv_memory` bytes into positions, behind what slots need whatever their length.

    Raises:
        ValueError: the memory does not hold the load-time checks.
    """
    states, max_model_len = manifest.states, manifest.limits.max_model_len
    appended = [state for state in states if state.rule is StateRule.APPEND]
    per_slot = sum(_row_bytes(state, source_capacity(manifest)) for state in states if state.rule is StateRule.FIXED)
    per_slot += sum(2 * _row_bytes(state, 0) for state in states if state.rule in (StateRule.REPLACE, StateRule.RING))
    per_position = sum(_row_bytes(state, 0) for state in appended)
    checked = min(_CHECKED_POSITIONS, rounded(max_model_len))
    least = num_slots * per_slot + checked * per_position
    if kv_memory < least:
        raise ValueError(
            f"kv_memory is {kv_memory} bytes, must be at least {least} for {num_slots} slots of {manifest.key}"
        )
    if not appended:
        return PoolSize(max_model_len, num_slots * rounded(max_model_len), None)
    budget = (kv_memory - num_slots * per_slot) // per_position // PAGE_POSITIONS * PAGE_POSITIONS
    window = _window(appended)
    return PoolSize(max_model_len if window else min(max_model_len, budget), budget, window)


def device_slots(manifest: Manifest, max_slots: int, kv_memory: int) -> int:
    """Return how many slots `kv_memory` bytes of a device hold, each as long as the model goes, at most `max_slots`.

    There is no memory there that is committed as it is written: a slot has all of its own from the start.

    Raises:
        ValueError: they do not hold a single one.
    """
    slot_bytes = manifest.limits.max_model_len * sum(_row_bytes(state, 0) for state in manifest.states)
    if kv_memory < slot_bytes:
        raise ValueError(
            f"kv_memory is {kv_memory} bytes, must be at least {slot_bytes}: one slot of {manifest.key} "
            f"holds {manifest.limits.max_model_len} tokens"
        )
    return min(max_slots, kv_memory // slot_bytes)


def free_for_states(free: int, weights: int, num_bundles: int) -> int:
    """Return what of a device's free bytes the states of one of several bundles may take, none of which is loaded yet.

    The rest is for what runs need beside weights and states, and for who else uses the device.
    """
    return max(0, int(_STATES_SHARE * (free - weights))) // num_bundles


def _window(appended: Iterable[StateSpec]) -> int | None:
    """Return how many positions stay in memory: the widest window, and the page that it begins in."""
    widest = 0
    for state in appended:
        if state.window is None:
            return None
        widest = max(widest, state.window + PAGE_POSITIONS + -(-mmap.PAGESIZE // position_bytes(state)))
    return widest


def _row_bytes(spec: StateSpec, source_positions: int) -> int:
    """Return the bytes of one row of a state, or of one position of it if it is appended to."""
    return _elements(spec.axes[1:], source_positions) * item_bytes(spec.dtype)


def _elements(axes: Sequence[int | str], source_positions: int) -> int:
    sizes = {SOURCE: source_positions, CAPACITY: 1}
    return math.prod(sizes[axis] if isinstance(axis, str) else axis for axis in axes)
