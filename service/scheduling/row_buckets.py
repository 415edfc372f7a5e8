"""How many rows a decode run has on a device: one of a few sizes, each of which is launched as one captured graph."""

from collections.abc import Sequence


def row_buckets(num_slots: int) -> tuple[int, ...]:
    """Return the sizes for so many slots: powers of two, and all of them."""
    return (*(1 << power for power in range((num_slots - 1).bit_length())), num_slots)


def bucket_of(num_rows: int, buckets: Sequence[int]) -> int:
    """Return the smallest size that holds so many rows; without sizes, just as many."""
    return next((size for size in buckets if size >= num_rows), num_rows)
