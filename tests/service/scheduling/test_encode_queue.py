"""Whose texts go next: random walks in which nothing is lost, nobody starves and deadlines come first."""

import random

import pytest

from service.scheduling.batching import BatchCost, BatchLimits
from service.scheduling.encode_queue import MAX_CANDIDATES, MAX_PASSED, EncodeQueue, Waiting
from service.scheduling.shares import QUANTUM_SECONDS

COST = BatchCost(1e-3, 6e-5, 1e-8)


def waiting(name: object, *lengths: int, arrival: float = 0.0, **fields: object) -> Waiting:
    return Waiting(owner=name, lengths=lengths, arrival=arrival, **fields)


def queue_of(*calls: Waiting) -> EncodeQueue:
    queue: EncodeQueue = EncodeQueue(BatchLimits())
    for call in calls:
        queue.add(call)
    return queue


def names(batch) -> set:
    return {call.owner for call, _ in batch}


@pytest.mark.parametrize("cost", [None, COST])
@pytest.mark.parametrize("seed", range(15))
def test_every_text_runs_exactly_once_within_the_limits(cost, seed):
    numbers, now = random.Random(seed), 0.0
    limits = BatchLimits(max_rows=8, max_tokens=256)
    queue: EncodeQueue = EncodeQueue(limits)
    here, run, cancelled = [], [], set()
    for step in range(120):
        now += numbers.random() * 0.2
        if numbers.random() < 0.6 and step < 100:
            lengths = [numbers.randint(1, 60) for _ in range(numbers.randint(1, 30))]
            deadline = numbers.choice([None, now + numbers.random() * 100])
            call = waiting(step, *lengths, arrival=now, deadline=deadline, priority=numbers.randint(-2, 2))
            queue.add(call)
            here.append(call)
        if here and numbers.random() < 0.05:
            call = numbers.choice(here)
            queue.remove(call)
            cancelled.add(call)
        batch = queue.next_batch(now, cost)
        assert all(call not in cancelled for call, _ in batch)
        lengths = [call.lengths[index] for call, index in batch]
        padded = len(lengths) * max(lengths, default=0)
        assert len(lengths) <= limits.max_rows and padded <= limits.max_tokens
        assert padded - sum(lengths) <= limits.max_padding * padded
        run += batch
        queue.charge(batch, 0.1)
        left = [call.lengths[index] for call in here if call not in cancelled for index in call.left]
        assert queue.backlog(COST) == (sum(left), pytest.approx(sum(map(COST.of_row, left))))
    while batch := queue.next_batch(now, cost):
        run += batch
    assert len(set(run)) == len(run)
    assert {(call, index) for call in here if call not in cancelled for index in range(len(call.lengths))} <= set(run)
    assert queue.num_waiting == 0


@pytest.mark.parametrize("seed", range(10))
def test_a_long_text_is_passed_by_a_bounded_number_of_batches(seed):
    numbers = random.Random(seed)
    older = [waiting(("older", number), 150 + 20 * number) for number in range(3)]
    queue = queue_of(*older, waiting("long", 500, arrival=0.001))
    for step in range(MAX_PASSED + len(older) + 1):
        now = 0.01 * step
        for number in range(30):  # more short ones than a batch takes, for ever
            queue.add(waiting((step, number), numbers.randint(8, 12), arrival=0.002 + now))
        batch = queue.next_batch(now, COST)
        if "long" in names(batch):
            return
    pytest.fail("it starves")


def test_short_texts_go_first_while_no_deadline_is_at_stake():
    queue = queue_of(waiting("long", 500), *(waiting(number, 10, arrival=0.001) for number in range(20)))
    assert names(queue.next_batch(0.01, COST)) == set(range(20))


def test_one_text_of_each_of_many_calls_goes_before_many_of_one_call():
    queue = queue_of(waiting("bulk", *[50] * 200), *(waiting(number, 20, arrival=0.001) for number in range(10)))
    assert names(queue.next_batch(0.01, COST)) == set(range(10))


@pytest.mark.parametrize("seed", range(20))
def test_where_a_deadline_is_at_stake_the_earliest_goes_first_within_its_priority(seed):
    numbers = random.Random(seed)
    calls = [
        waiting(number, numbers.randint(5, 300), deadline=0.3 * numbers.random(), priority=numbers.randint(0, 2))
        for number in range(40)
    ]
    queue, left = queue_of(*calls), set(calls)
    while batch := queue.next_batch(0.0, COST):
        first = min(left, key=lambda call: (-call.priority, call.deadline))
        assert first in {call for call, _ in batch}
        for call, _ in batch:
            queue.remove(call)
            left.discard(call)
    assert not left


def test_waiting_makes_up_for_priority():
    queue = queue_of(waiting("old", 300), waiting("urgent", 10, arrival=25.0, priority=2))
    assert names(queue.next_batch(19.0, COST)) == {"urgent"}
    queue = queue_of(waiting("old", 300), waiting("urgent", 10, arrival=35.0, priority=2))
    assert names(queue.next_batch(35.0, COST)) == {"old"}


def test_tenants_get_their_shares():
    greedy = [waiting(("greedy", number), 100, tenant="greedy") for number in range(60)]
    queue = queue_of(*greedy, waiting("modest", 30, arrival=5.0, tenant="modest"))
    queue.charge([(greedy[0], 0)], 2.5 * QUANTUM_SECONDS)
    assert names(queue.next_batch(5.0, COST)) == {"modest"}


def test_the_predicted_finish_counts_what_is_more_urgent_and_nothing_else():
    queue = queue_of(waiting("before", *[100] * 30), waiting("after", *[100] * 30, priority=-1))
    newcomer = waiting("new", 50, arrival=0.1)
    ahead = 3 * COST.of_batch(10, 100)
    assert queue.seconds_to_finish(newcomer, 0.1, COST) == pytest.approx(ahead + COST.of_batch(1, 50))
    assert queue.seconds_to_finish(waiting("rash", 50, priority=5), 0.1, COST) == pytest.approx(COST.of_batch(1, 50))


def test_the_predicted_finish_of_very_many_texts_is_near_the_exact_one():
    numbers = random.Random(0)
    calls = [waiting(number, *(numbers.randint(5, 100) for _ in range(256))) for number in range(16)]
    queue, seconds = queue_of(*calls), 0.0
    found = queue.seconds_to_finish(waiting("new", 50, arrival=0.1), 0.1, COST)
    assert queue.num_waiting > 3 * MAX_CANDIDATES
    while batch := queue.next_batch(0.1, COST):
        seconds += COST.of_batch(len(batch), max(call.lengths[index] for call, index in batch))
    assert found == pytest.approx(seconds, rel=0.05)


def test_what_is_hopeless_is_dropped_unless_it_is_alone():
    hopeless = waiting("hopeless", *[100] * 50, deadline=0.2)
    assert queue_of(hopeless).drop_hopeless(0.1, COST) == []
    queue = queue_of(hopeless, waiting("other", 10, deadline=0.2))
    assert queue.drop_hopeless(0.1, COST) == [hopeless]
    assert names(queue.next_batch(0.1, COST)) == {"other"}
