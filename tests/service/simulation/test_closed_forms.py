"""The simulator beside what can be computed by hand: a virtual engine of a known law, and queues with known answers."""

import itertools
import random

import pytest

from service.scheduling.config import SchedulerConfig
from service.scheduling.scheduler import chunk_length
from service.scheduling.work import decode_work, prefill_work
from service.simulation.fleet import simulate
from service.simulation.replica import Ending, Machine, Outcome, Replica
from service.simulation.report import percentiles, quantile, report
from service.simulation.trace import Arrival
from service.simulation.virtual_engine import Laws

LAWS = Laws({"prefill": (0.01, 0.001, 1e-6), "decode": (0.005, 0.0007, 1e-7)})
OVERHEAD = 0.0005


def machine(num_slots: int = 4, **fields: object) -> Machine:
    config = SchedulerConfig(num_slots=num_slots, capacity=2048, kv_budget=num_slots * 2048, inter_token_target=0.05)
    return Machine(config=config, **{"laws": LAWS, "overhead_seconds": OVERHEAD, **fields})


def arrival(at: float, prompt_tokens: int, output_tokens: int, **fields: object) -> Arrival:
    return Arrival(arrival_seconds=at, prompt_tokens=prompt_tokens, output_tokens=output_tokens, **fields)


def poisson(rate: float, number: int, prompt_tokens: int, output_tokens: int) -> list[Arrival]:
    draw = random.Random(0)
    times = itertools.accumulate(draw.expovariate(rate) for _ in range(number))
    return [arrival(at, prompt_tokens, output_tokens) for at in times]


def test_a_request_alone_takes_exactly_what_the_law_says():
    (outcome,) = simulate(machine(), [arrival(3.0, 100, 6)]).outcomes
    assert outcome.ttft == pytest.approx(OVERHEAD + LAWS.predict("prefill", prefill_work(0, 100)), rel=1e-12)
    steps = [OVERHEAD + LAWS.predict("decode", decode_work([100 + i])) for i in range(1, 6)]
    assert outcome.gaps == pytest.approx(steps, rel=1e-9)
    assert outcome.e2e == pytest.approx(outcome.ttft + sum(steps), rel=1e-12)


def test_a_long_prompt_takes_the_sum_of_its_chunks():
    (outcome,) = simulate(machine(), [arrival(0.0, 1300, 1)]).outcomes
    expected, start = 0.0, 0
    while start < 1300:
        length = chunk_length(1300 - start, machine().config.idle_chunk_tokens)
        expected += OVERHEAD + LAWS.predict("prefill", prefill_work(start, length))
        start += length
    assert outcome.e2e == outcome.ttft == pytest.approx(expected, rel=1e-12)


def test_a_request_that_comes_when_another_ends_takes_as_long():
    (first,) = simulate(machine(), [arrival(0.0, 50, 4)]).outcomes
    runs = simulate(machine(), [arrival(0.0, 50, 4), arrival(first.ended_seconds, 50, 4)]).outcomes
    assert [outcome.e2e for outcome in runs] == pytest.approx([first.e2e] * 2, rel=1e-9)


def test_rows_that_decode_together_share_a_step():
    outcomes = simulate(machine(4), [arrival(0.0, 20, 8) for _ in range(4)]).outcomes
    together = LAWS.predict("decode", decode_work([27] * 4)) + OVERHEAD
    assert [outcome.gaps[-1] for outcome in outcomes] == pytest.approx([together] * 4, rel=1e-9)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_slot_and_poisson_arrivals_wait_as_the_pollaczek_khinchine_formula_says(load: float):
    """M/D/1: a wait of load x service / (2 (1 - load)) in the mean."""
    service = OVERHEAD + LAWS.predict("prefill", prefill_work(0, 40))
    outcomes = simulate(machine(1, max_waiting_requests=10**6), poisson(load / service, 10_000, 40, 1)).outcomes
    waits = [outcome.e2e - service for outcome in outcomes]
    assert min(waits) == pytest.approx(0.0, abs=1e-9)
    assert sum(waits) / len(waits) == pytest.approx(load * service / (2 * (1 - load)), rel=0.06)


class Watched(Replica):
    """Sums the requests that are here over time, by what the replica itself holds."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.request_seconds = self.occupied_seconds = self._since = 0.0

    def _pass(self, now: float) -> None:
        self.request_seconds += self.num_requests * (now - self._since)
        self.occupied_seconds += (self.num_requests > 0) * (now - self._since)
        self._since = now

    def submit(self, outcome: Outcome, number: int) -> bool:
        self._pass(outcome.arrival.arrival_seconds)
        return super().submit(outcome, number)

    def turn(self, now: float) -> float | None:
        self._pass(now)
        return super().turn(now)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    made: list[Watched] = []

    def make(machine: Machine) -> Watched:
        made.append(Watched(machine))
        return made[-1]

    monkeypatch.setattr("service.simulation.fleet.Replica", make)
    return made


def test_littles_law_holds_of_the_requests_that_are_there(watched: list[Watched]):
    outcomes = simulate(machine(), poisson(8.0, 500, 60, 12)).outcomes
    assert watched[0].request_seconds == pytest.approx(sum(outcome.e2e for outcome in outcomes), rel=1e-9)


def test_no_replica_rests_while_it_has_a_request(watched: list[Watched]):
    run = simulate(machine(), poisson(8.0, 500, 60, 12), 2, routing="two-choices")
    for replica, effort in zip(watched, run.efforts, strict=True):
        assert effort.busy_seconds == pytest.approx(replica.occupied_seconds, rel=1e-9)
        assert effort.busy_seconds > 1


def test_a_prompt_that_another_began_with_is_not_computed_again():
    config = SchedulerConfig(num_slots=4, capacity=2048, kv_budget=8192, reuses_prefixes=True)
    shared = {"prefix_group": "system", "prefix_tokens": 400}
    trace = [arrival(0.0, 420, 2, **shared), arrival(5.0, 420, 2, **shared), arrival(10.0, 420, 2)]
    first, second, stranger = simulate(Machine(config=config, laws=LAWS), trace).outcomes
    assert second.ttft == pytest.approx(LAWS.predict("prefill", prefill_work(400, 20)), rel=1e-9)
    assert first.ttft == pytest.approx(stranger.ttft, rel=1e-9)


def test_a_client_that_hangs_up_frees_its_place():
    trace = [arrival(0.0, 20, 500, budget_seconds=1.0), arrival(0.1, 20, 2)]
    first, second = simulate(machine(1, sends_deadlines=False), trace).outcomes
    assert (first.ending, first.ended_seconds) == (Ending.HUNG_UP, 1.0)
    assert second.ending is Ending.FINISHED
    assert 1.0 < second.first_token_seconds < 1.1


def test_a_report_adds_up():
    run = simulate(machine(), [arrival(0.1 * i, 30 + 40 * (i % 5), 5) for i in range(100)], 2)
    found = report(run, (64, 128))
    assert [one.up_to_tokens for one in found.by_length] == [64, 128, None]
    assert sum(one.requests for one in found.by_length) == found.total.requests == 100
    assert found.output_tokens_per_second * found.seconds == pytest.approx(500)
    assert found.requests_per_second * found.seconds == pytest.approx(100)
    assert found.total.goodput == 1.0


def test_percentiles_are_values_that_a_share_does_not_exceed():
    draw = random.Random(0)
    for size in (1, 2, 19, 20, 100):
        values = sorted(draw.random() for _ in range(size))
        for share in (0.5, 0.95, 0.99):
            found = quantile(values, share)
            assert sum(value <= found for value in values) >= share * size
            assert sum(value < found for value in values) < share * size
    assert percentiles([None]).p50 is None
