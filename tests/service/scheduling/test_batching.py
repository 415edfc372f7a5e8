"""Forming batches: properties over random queues, and the best of all by trying every one."""

import random
import time
from itertools import combinations, pairwise
from math import inf

import pytest

from service.scheduling.batching import BatchCost, BatchLimits, form_batch, split
from service.scheduling.latency import LatencyModel
from service.scheduling.work import encode_work

MINILM = BatchCost(1e-3, 6e-5, 1e-8)  # seconds, about those of a small encoder on two cores


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


def mixed_lengths(numbers: random.Random, number: int) -> list[int]:
    return [min(180, max(3, round(numbers.lognormvariate(3.3, 0.9)))) for _ in range(number)]


def random_limits(numbers: random.Random) -> BatchLimits:
    return BatchLimits(
        max_rows=numbers.randint(1, 12),
        max_tokens=numbers.randint(1, 200),
        max_padding=numbers.choice([0, 0.1, 0.1, 0.3, 0.9]),
    )


def random_cost(numbers: random.Random) -> BatchCost:
    return BatchCost(*(numbers.choice([0, numbers.random() * scale]) for scale in (10, 1, 0.1)))


def least_seconds(lengths: list[int], cost: BatchCost, limits: BatchLimits) -> float:
    """Return the least time, every beginning of every batch tried."""
    best = [0.0] + [inf] * len(lengths)
    for last in range(1, len(lengths) + 1):
        for first in range(last):
            if keeps(lengths[first:last], limits):
                best[last] = min(best[last], best[first] + cost.of_batch(last - first, lengths[last - 1]))
    return best[-1]


@pytest.mark.parametrize("seed", range(400))
def test_the_split_takes_least_time_of_all_that_keep_the_limits(seed):
    numbers = random.Random(seed)
    limits, cost = random_limits(numbers), random_cost(numbers)
    longest = numbers.choice([3, 10, 60])
    lengths = sorted(numbers.randint(1, longest) for _ in range(numbers.randint(1, 40)))
    batches = split(lengths, cost, limits)
    assert (batches[0].first, batches[-1].last) == (0, len(lengths))
    assert all(left.last == right.first for left, right in pairwise(batches))
    assert all(keeps(lengths[batch.first : batch.last], limits) for batch in batches)
    assert sum(batch.seconds for batch in batches) == pytest.approx(least_seconds(lengths, cost, limits))


def present_rule_seconds(waiting: list[int], cost: BatchCost) -> float:
    """Return the predicted time of the batches that are formed without costs."""
    seconds = 0.0
    while waiting:
        batch = form_batch(waiting, BatchLimits())
        seconds += cost.of_batch(len(batch), max(waiting[index] for index in batch))
        waiting = [length for index, length in enumerate(waiting) if index not in batch]
    return seconds


@pytest.mark.parametrize("seed", range(10))
def test_the_split_never_takes_longer_than_batches_formed_without_costs_and_pads_as_little(seed):
    numbers = random.Random(seed)
    cost = BatchCost(numbers.choice([0, 1e-3, 1e-2]), 6e-5, numbers.choice([0, 1e-7]))
    lengths = mixed_lengths(numbers, 256)
    batches = split(sorted(lengths), cost, BatchLimits())
    assert sum(batch.seconds for batch in batches) <= present_rule_seconds(lengths, cost) * (1 + 1e-9)
    padded = sum((batch.last - batch.first) * sorted(lengths)[batch.last - 1] for batch in batches)
    assert padded - sum(lengths) <= 0.1 * padded


def test_padding_is_split_off_where_it_costs_more_than_a_run():
    lengths = [19] * 8 + [20] * 8
    assert [batch.last for batch in split(lengths, BatchCost(7.9, 1, 0), BatchLimits())] == [8, 16]
    assert [batch.last for batch in split(lengths, BatchCost(8.1, 1, 0), BatchLimits())] == [16]


def test_a_batch_costs_what_the_latency_model_predicts():
    model, numbers = LatencyModel(), random.Random(0)
    for _ in range(100):
        work = encode_work(numbers.randint(1, 16), numbers.randint(1, 200))
        model.observe("encode", work, 2e-3 + 1e-5 * work.tokens + 1e-8 * work.attended)
    cost = BatchCost(*model.coefficients("encode"))
    for rows, length in ((1, 1), (7, 30), (16, 200)):
        assert cost.of_batch(rows, length) == pytest.approx(model.predict("encode", encode_work(rows, length)))


@pytest.mark.parametrize("lengths", [mixed_lengths(random.Random(0), 1024), [16] * 1024, list(range(1, 513)) * 2])
def test_a_thousand_candidates_are_split_in_milliseconds(lengths):
    ordered, times = sorted(lengths), []
    for _ in range(10):
        started = time.perf_counter()
        split(ordered, MINILM, BatchLimits())
        times.append(time.perf_counter() - started)
    assert min(times) < 0.01, "0.9 to 2.4 ms were measured; one batch of 1,024 tokens takes 40 and more"
