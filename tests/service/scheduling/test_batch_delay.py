"""Waiting for company: by the expected latency over all delays, and by simulated arrivals."""

import heapq
import random
from statistics import fmean

import pytest

from service.scheduling.batch_delay import Arrivals, Company, best_delay


def latency(company: Company, delay: float, gap: float) -> float:
    """Return the latency over all texts as it comes about, second by second of the server."""
    together = gap <= delay
    begun = gap if together else delay
    first = begun + company.run + (company.rows + together) * company.row
    last = first if together else max(first, gap) + company.run + company.row
    return company.rows * first + last - gap


@pytest.mark.parametrize("seed", range(100))
def test_no_other_delay_is_much_better_than_the_chosen_one(seed):
    numbers = random.Random(seed)
    company = Company(rows=numbers.randint(1, 4), run=1.0, row=numbers.choice([0.001, 0.05, 0.3, 1.0]))
    scale = numbers.choice([0.01, 0.1, 1.0, 10.0])
    gaps = [numbers.expovariate(1 / scale) for _ in range(32)]
    limit = numbers.choice([0.0, 0.05, 5.0])
    chosen = best_delay(company, gaps, limit)
    assert 0 <= chosen <= limit

    def expected(delay: float) -> float:
        return fmean(latency(company, delay, gap) for gap in gaps)

    best = min(expected(delay) for delay in [0.0, *(gap for gap in gaps if gap <= limit)])
    assert expected(chosen) <= expected(0.0) * (1 if chosen else 1.000001)
    if chosen:
        assert expected(chosen) <= 0.95 * expected(0.0), "chance could have made it so"
    assert best >= 0.84 * expected(chosen)


def test_a_run_that_costs_as_much_as_its_rows_never_waits():
    for rows in (1, 2, 8):
        assert best_delay(Company(rows=rows, run=1.0, row=1.0 / rows), [1e-9] * 32, 10.0) == 0.0


def test_nothing_is_concluded_from_few_arrivals_or_long_after_the_last():
    arrivals = Arrivals()
    for number in range(16):
        arrivals.note(number * 0.01)
    assert arrivals.next_gaps(0.15) == []
    arrivals.note(0.16)
    assert arrivals.next_gaps(0.162) == pytest.approx([0.008] * 16)
    assert arrivals.next_gaps(0.2) == []


def simulated(times: list[float], clients: int, think: float, max_delay: float, row: float, seed: int) -> float:
    """Return the mean latency of a server whose runs cost 1 and `row` for each text.

    Args:
        times: of calls; with `clients`, each of them calls again after a while.
        clients: who are in a closed loop; none if 0.
        think: mean of that while.
        max_delay: that a batch may wait.
        row: seconds.
        seed: of the while.
    """
    numbers, coming = random.Random(seed), sorted(times)
    arrivals, waiting, now, latencies = Arrivals(), [], 0.0, []

    def take() -> None:
        while coming and coming[0] <= now:
            waiting.append(heapq.heappop(coming))
            arrivals.note(waiting[-1])

    while (coming or waiting) and len(latencies) < 800:
        now = now if waiting else max(now, coming[0])
        take()
        end = now + max_delay
        while (
            delay := best_delay(Company(rows=len(waiting), run=1.0, row=row), arrivals.next_gaps(now), end - now)
        ) > 0:
            now = coming[0] if coming and coming[0] <= now + delay else now + max(delay, 1e-3)
            take()
        now += 1 + len(waiting) * row
        latencies += [now - arrival for arrival in waiting]
        for _ in waiting[: len(waiting) * bool(clients)]:
            heapq.heappush(coming, now + numbers.expovariate(1 / think))
        waiting.clear()
    return fmean(latencies)


def gain(times: list[float], *, clients: int = 0, think: float = 0.05, row: float = 0.03, seed: int = 0) -> float:
    """Return the latency with a delay window over that without one."""
    return simulated(times, clients, think, 5.0, row, seed) / simulated(times, clients, think, 0.0, row, seed)


@pytest.mark.parametrize("rate", [0.3, 1, 3, 6])
def test_independent_arrivals_are_not_harmed(rate):
    gains = []
    for seed in range(4):
        numbers, times = random.Random(seed), [0.0]
        while len(times) < 800:
            times.append(times[-1] + numbers.expovariate(rate))
        gains.append(gain(times))
    assert fmean(gains) < 1.02


def test_bursts_and_clients_who_return_together_gain():
    numbers, times = random.Random(1), []
    for burst in range(200):
        start = burst * 10 + numbers.random()
        times += [start + 0.05 * number for number in range(4)]
    assert gain(times) < 0.85
    assert gain([0.01 * number for number in range(8)], clients=8) < 0.85
