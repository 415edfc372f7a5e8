"""Forming batches: properties over random queues, and the best of all by trying every one."""

import random
from itertools import combinations

import pytest

from service.scheduling.batching import BatchLimits, form_batch


def keeps(lengths, limits):
    padded = len(lengths) * max(lengths)
    alone = len(lengths) == 1
    return alone or (
        len(lengths) <= limits.max_rows
        and padded <= limits.max_tokens
        and padded - sum(lengths) <= limits.max_padding * padded
    )


@pytest.mark.parametrize("seed", range(50))
def test_the_oldest_runs_and_the_limits_are_kept(seed):
    numbers = random.Random(seed)
    limits = BatchLimits(
        max_rows=numbers.randint(1, 40), max_tokens=numbers.randint(1, 600), max_padding=numbers.choice([0, 0.1, 0.5])
    )
    lengths = [max(1, int(numbers.lognormvariate(3, 1))) for _ in range(numbers.randint(1, 80))]
    batch = form_batch(lengths, limits)
    assert 0 in batch
    assert len(set(batch)) == len(batch)
    assert keeps([lengths[index] for index in batch], limits)
    assert [lengths[index] for index in batch] == sorted(lengths[index] for index in batch)


@pytest.mark.parametrize("seed", range(30))
def test_no_range_of_neighbours_by_length_holds_more_tokens(seed):
    numbers = random.Random(seed)
    limits = BatchLimits(max_rows=4, max_tokens=60, max_padding=0.2)
    lengths = numbers.sample(range(1, 31), 9)
    chosen = sum(lengths[index] for index in form_batch(lengths, limits))
    ordered = sorted(lengths)
    for first, last in combinations(range(10), 2):
        batch = ordered[first:last]
        if lengths[0] in batch and keeps(batch, limits):
            assert sum(batch) <= chosen


def test_a_text_longer_than_a_batch_runs_alone():
    assert form_batch([500, 500, 3], BatchLimits(max_tokens=100)) == [0]


def test_every_text_of_a_mixed_queue_runs_with_little_padding():
    numbers = random.Random(0)
    waiting = [min(180, max(3, int(numbers.lognormvariate(3.2, 0.8)))) for _ in range(256)]
    real, padded, runs = sum(waiting), 0, 0
    while waiting:
        batch = form_batch(waiting, BatchLimits())
        padded += len(batch) * max(waiting[index] for index in batch)
        waiting = [length for index, length in enumerate(waiting) if index not in batch]
        runs += 1
    assert (padded - real) / padded <= 0.1
    assert runs < 40


@pytest.mark.parametrize("field", [{"max_rows": 0}, {"max_tokens": 0}, {"max_padding": 1.0}, {"max_padding": -0.1}])
def test_limits_out_of_range_are_named(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        BatchLimits(**field)
