"""What a device's sampler has on both sides: what rows want, on its way there; what was chosen, on its way back."""

from collections.abc import Sequence

import numpy as np

from attendant.bundle import DType
from service.engine.adjustments import ENTRY, Adjustments
from service.engine.device import Array, Device


class Mirror:
    """An array of the host [rows, ...] and its copy on the device, which is renewed where it differs."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: DType, neutral: float = 0) -> None:
        self.array = np.full(shape, neutral, dtype.value)
        self.buffer = device.allocate(shape, dtype)
        device.upload(self.array, self.buffer)

    def write(self, values: Sequence[float] | Array) -> None:
        """Set the first rows."""
        known, fresh = self.array[: len(values)], np.asarray(values, self.array.dtype)
        if not np.array_equal(known, fresh):
            known[:] = fresh
            self.upload(len(values))

    def upload(self, num_rows: int) -> None:
        """Copy the first rows to the device."""
        self.buffer.device.upload(self.array[:num_rows], self.buffer[:num_rows])


class Room:
    """Adjustments of every row, `size` entries each; only what changed of a row is written again."""

    def __init__(self, device: Device, num_rows: int, size: int) -> None:
        self.size = size
        self.mirrors = {
            role: Mirror(device, (num_rows, size), dtype, neutral) for role, (dtype, neutral) in ENTRY.items()
        }
        # Whose entries a row has, and how many of their changes.
        self._written: list[tuple[Adjustments | None, int]] = [(None, 0)] * num_rows

    def write(self, rows: Sequence[Adjustments | None]) -> None:
        """Set the first rows; None is one that changes nothing."""
        is_changed = False
        changes: list[tuple[int, int, Adjustments]] = []
        for row, adjustments in enumerate(rows):
            known, num_known = self._written[row]
            num_changes = len(adjustments.changes) if adjustments else 0
            if adjustments is known and num_changes == num_known:
                continue
            self._written[row], is_changed = (adjustments, num_changes), True
            if adjustments is None:
                for role, (_, neutral) in ENTRY.items():
                    self.mirrors[role].array[row] = neutral
            elif adjustments is known and 0 not in (places := adjustments.changes[num_known:]):
                changes += [(row, place, adjustments) for place in places]
            else:  # the first entry stands in every place that is left over, too
                adjustments.write({role: mirror.array[row] for role, mirror in self.mirrors.items()})
        if changes:
            at = tuple(np.array([change[:2] for change in changes]).T)
            for role, mirror in self.mirrors.items():
                mirror.array[at] = [adjustments.arrays[role][place] for _, place, adjustments in changes]
        if is_changed:
            for mirror in self.mirrors.values():
                mirror.upload(len(rows))


class Arriving:
    """A result on the device, and where its first rows arrive on the host."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: DType) -> None:
        self.buffer = device.allocate(shape, dtype)
        self.array = device.host_array(shape, dtype)

    def download(self, num_rows: int) -> None:
        """Have the first rows brought to the host."""
        self.buffer.device.download(self.buffer[:num_rows], self.array[:num_rows])
