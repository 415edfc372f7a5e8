"""Every rule of a state, on real memory."""

import resource
from pathlib import Path

import numpy as np
import pytest

from attendant.bundle import DType, Manifest, StateRule, StateSpec
from service.bundle import FoundBundle
from service.engine.pools import StatePool, make_pool, pool_size, source_capacity

WINDOW = 100


def spec(rule: StateRule, *axes: int | str, **fields: object) -> StateSpec:
    output = None if rule is StateRule.FIXED else "present"
    made = "made" if rule is StateRule.FIXED else None
    return StateSpec(
        name="state",
        rule=rule,
        dtype=DType.FLOAT32,
        axes=("rows", *axes),
        input="past",
        output=output,
        made=made,
        **fields,
    )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def write(pool: StatePool, slot: int, start: int, end: int, value: float) -> None:
    pool.present(slice(slot, slot + 1))[0, :, start:end] = value


def test_what_is_appended_is_written_in_place_and_copied_as_far_as_it_goes() -> None:
    pool = make_pool(spec(StateRule.APPEND, 2, "capacity", 8), 3, 64, 0)
    assert pool.present(slice(0, 3)).ctypes.data == pool.array.ctypes.data
    write(pool, 0, 0, 64, 1.0)
    pool.copy(0, 2, 20)
    assert (pool.array[2, :, :20] == 1).all()
    assert (pool.array[2, :, 20:] == 0).all()
    pool.release(0)
    assert (pool.array[2, :, :20] == 1).all()


def test_memory_behind_a_window_is_given_back_while_a_sequence_grows() -> None:
    capacity = 1 << 16
    pool = make_pool(spec(StateRule.APPEND, 2, "capacity", 64, window=WINDOW), 2, capacity, 0)
    pool.begin(1, None, 0)
    before = resident_bytes()
    for start in range(0, capacity, 64):
        write(pool, 1, start, start + 64, float(start))
        pool.trim(1, start + 64)
        assert (pool.array[1, :, max(0, start + 64 - WINDOW) : start + 64] > 0).all() or start <= WINDOW
    assert resident_bytes() - before < 2_000_000, "of 33 MB that were written"
    assert (pool.array[1, :, : capacity - 2 * WINDOW] == 0).all()


def test_a_copy_takes_no_more_than_the_window() -> None:
    pool = make_pool(spec(StateRule.APPEND, 2, "capacity", 8, window=16), 2, 64, 0)
    write(pool, 0, 0, 64, 1.0)
    pool.copy(0, 1, 40)
    assert (pool.array[1, :, 24:40] == 1).all()
    assert (pool.array[1, :, :24] == 0).all() and (pool.array[1, :, 40:] == 0).all()


@pytest.mark.parametrize("rule", [StateRule.REPLACE, StateRule.RING])
def test_what_is_replaced_counts_only_once_it_is_committed(rule: StateRule) -> None:
    pool = make_pool(spec(rule, 4), 5, 64, 0)
    pool.present(slice(0, 5))[:] = np.arange(5, dtype=np.float32)[:, None]
    assert (pool.array == 0).all()
    pool.commit([1, 2])
    pool.commit([4])
    assert pool.array[:, 0].tolist() == [0, 1, 2, 0, 4]
    pool.commit([0, 3])
    assert pool.array[:, 0].tolist() == [0, 1, 2, 3, 4]
    pool.copy(4, 0, 9)
    pool.begin(3, np.full(4, 7, np.float32), 0)
    pool.begin(2, None, 0)
    assert pool.array[:, 0].tolist() == [4, 1, 0, 7, 4]


def test_what_is_fixed_is_as_long_as_its_source_and_zero_behind() -> None:
    pool = make_pool(spec(StateRule.FIXED, 2, "source", 4), 2, 64, 16)
    pool.begin(0, np.full((2, 12, 4), np.nan, np.float32), 12)
    padded = np.full((2, 12, 4), 3, np.float32)
    padded[:, 9:] = np.nan  # of the longer neighbours that it was read with
    pool.begin(0, padded, 9)
    assert (pool.array[0, :, :9] == 3).all() and (pool.array[0, :, 9:] == 0).all()
    pool.copy(0, 1, 5)
    assert (pool.array[1] == pool.array[0]).all()


def manifest_with(manifest: Manifest, *states: StateSpec, max_source_len: int | None = None) -> Manifest:
    limits = manifest.limits.model_copy(update={"max_model_len": 512, "max_source_len": max_source_len})
    return manifest.model_copy(update={"states": states, "limits": limits})


def test_memory_is_divided_into_positions_behind_what_slots_need_anyway(tiny_bundles: dict[str, FoundBundle]) -> None:
    appended = spec(StateRule.APPEND, 2, "capacity", 8)  # 64 bytes a position
    replaced, fixed = spec(StateRule.REPLACE, 10), spec(StateRule.FIXED, "source", 5)
    manifest = manifest_with(tiny_bundles["fp32"].manifest, appended, replaced, fixed, max_source_len=20)
    assert source_capacity(manifest) == 32
    per_slot = 2 * 40 + 32 * 20
    size = pool_size(manifest, 3, 64 * 320 + 3 * per_slot)
    assert (size.budget, size.capacity, size.window) == (320, 320, None)
    with pytest.raises(ValueError, match=f"must be at least {64 * 256 + 3 * per_slot} for 3 slots"):
        pool_size(manifest, 3, 64 * 256 + 3 * per_slot - 1)


def test_states_of_one_size_put_no_limit_on_lengths(tiny_bundles: dict[str, FoundBundle]) -> None:
    manifest = manifest_with(tiny_bundles["fp32"].manifest, spec(StateRule.REPLACE, 10))
    size = pool_size(manifest, 3, 3 * 80)
    assert (size.budget, size.capacity) == (3 * 512, 512)
    windowed = spec(StateRule.APPEND, 2, "capacity", 8, window=WINDOW)
    size = pool_size(manifest_with(tiny_bundles["fp32"].manifest, windowed), 3, 64 * 256)
    assert size.capacity == 512, "a long sequence needs no more memory than its window"
    assert size.window is not None and WINDOW < size.window < WINDOW + 200
    full = spec(StateRule.APPEND, 2, "capacity", 8)
    assert pool_size(manifest_with(tiny_bundles["fp32"].manifest, windowed, full), 3, 1 << 20).window is None
