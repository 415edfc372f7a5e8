"""How many rows a decode run has on a device: one of a few sizes, each of which is launched as one captured graph."""

from collections.abc import Sequence


def row_buckets(num_slots: int) -> tuple[int, ...]:
    """Return the sizes for so many slots: powers of two, from 8 on also what lies halfway, and all of them.

    A parked row reads all that its slot still holds, as a real one does: so not only powers of two.
    """
    sizes = {base << power for base in (1, 12) for power in range(num_slots.bit_length())}
    return (*sorted(size for size in sizes if size < num_slots), num_slots)


def bucket_of(num_rows: int, buckets: Sequence[int]) -> int:
    """Return the smallest size that holds so many rows; without sizes, just as many."""
    return next((size for size in buckets if size >= num_rows), num_rows)
