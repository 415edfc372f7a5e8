"""Whatever comes, and however many replicas there are: nothing is lost, and the same traffic has the same fate."""

import itertools
import random
from dataclasses import replace

import pytest

from service.scheduling.config import SchedulerConfig
from service.scheduling.invariants import violations
from service.scheduling.scheduler import Scheduler
from service.simulation.fleet import ROUTINGS, simulate
from service.simulation.replica import Ending, Machine
from service.simulation.slo import parse_slo, replicas_needed
from service.simulation.synthetic import Traffic
from service.simulation.trace import Arrival
from service.simulation.virtual_engine import Laws

MACHINE = Machine(
    config=SchedulerConfig(num_slots=6, capacity=512, kv_budget=1536, inter_token_target=0.05, reuses_prefixes=True),
    laws=Laws({"prefill": (0.004, 0.0004, 1e-8), "decode": (0.004, 0.0004, 2e-8)}),
    overhead_seconds=0.001,
    max_waiting_requests=4,
)


def traffic(rate: float, seconds: float, seed: int = 0, **fields: object) -> list[Arrival]:
    given = {"burst_factor": 2.0, "most_tokens": 240, "long_tokens": 150, "output_tokens": 24, **fields}
    return Traffic(rate=rate, duration_seconds=seconds, seed=seed, **given).arrivals()


def mixed(seed: int) -> list[Arrival]:
    """Requests of all kinds, too many for the machine."""
    draw = random.Random(seed)
    return [
        replace(
            arrival,
            prompt_tokens=600 if draw.random() < 0.02 else arrival.prompt_tokens,
            max_tokens=arrival.output_tokens + draw.choice([0, 0, 40]),
            budget_seconds=draw.choice([None, 0.2, 1.0, 3.0]),
            priority=draw.choice([-1, 0, 0, 2]),
            tenant=draw.choice(["", "a", "b"]),
            prefix_group=draw.choice(["", "system"]),
            prefix_tokens=min(arrival.prompt_tokens, 20),
        )
        for arrival in traffic(50.0, 5.0, seed)
    ]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of every scheduler leaves its invariants whole."""
    for name in ("schedule", "update", "expire"):
        original = getattr(Scheduler, name)

        def whole(self, *arguments, original=original):
            result = original(self, *arguments)
            assert violations(self.snapshot()) == []
            return result

        monkeypatch.setattr(Scheduler, name, whole)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("sends", [True, False])
def test_every_arrival_ends_in_one_way_and_no_invariant_is_ever_broken(checked: None, routing: str, sends: bool):
    arrivals = mixed(seed=ROUTINGS.index(routing))
    run = simulate(replace(MACHINE, sends_deadlines=sends), arrivals, 2, routing=routing)
    assert [outcome.arrival for outcome in run.outcomes] == arrivals
    endings = {outcome.ending for outcome in run.outcomes}
    assert None not in endings
    assert {Ending.FINISHED, Ending.TOO_LONG, Ending.QUEUE_FULL} <= endings
    assert bool(endings & {Ending.EXPIRED, Ending.REFUSED}) is sends
    assert (Ending.HUNG_UP in endings) is not sends
    for outcome in run.outcomes:
        assert (outcome.num_tokens == outcome.arrival.output_tokens) is (outcome.ending is Ending.FINISHED)
        assert outcome.ended_seconds >= outcome.arrival.arrival_seconds
        assert len(outcome.gaps) == max(0, outcome.num_tokens - 1)
        assert all(gap > 0 for gap in outcome.gaps)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_same_seed_has_the_same_fate(routing: str):
    first, second = (simulate(MACHINE, mixed(3), 3, routing=routing, seed=5) for _ in range(2))
    assert first == second
    assert simulate(MACHINE, mixed(4), 3, routing=routing, seed=5) != first


@pytest.mark.parametrize("number", [2, 7])
def test_so_many_replicas_with_as_many_times_the_arrivals_behave_like_one(number: int):
    arrivals = mixed(6)
    alone = simulate(MACHINE, arrivals).outcomes
    many = simulate(MACHINE, [each for each in arrivals for _ in range(number)], number, routing="round-robin").outcomes
    assert [outcome for outcome in alone for _ in range(number)] == list(many)


@pytest.mark.parametrize("routing", ["round-robin", "least-loaded"])
def test_more_replicas_finish_no_less_in_time(routing: str):
    arrivals = traffic(40.0, 6.0, budget_seconds=1.5)
    on_time = [
        sum(outcome.is_on_time for outcome in simulate(MACHINE, arrivals, number, routing=routing).outcomes)
        for number in (1, 2, 3, 4, 6, 8, 12)
    ]
    slack = 0.01 * len(arrivals)
    assert all(later >= earlier - slack for earlier, later in itertools.pairwise(on_time))
    assert on_time[-1] > 0.99 * len(arrivals)
    assert on_time[0] < 0.5 * len(arrivals)


def test_looking_at_loads_beats_not_looking():
    one_slot = replace(MACHINE.config, num_slots=1, kv_budget=512)
    machine = replace(MACHINE, config=one_slot, max_waiting_requests=10_000)
    arrivals = traffic(14.0, 20.0, burst_factor=1.0)
    waits = {}
    for routing in ROUTINGS:
        outcomes = simulate(machine, arrivals, 4, routing=routing).outcomes
        waits[routing] = sum(outcome.wait_seconds for outcome in outcomes)
    assert waits["least-loaded"] < 0.8 * waits["two-choices"]
    assert waits["least-loaded"] < 0.8 * waits["round-robin"]


def test_the_replicas_found_are_the_fewest_that_meet_the_objectives():
    arrivals = traffic(60.0, 3.0, burst_factor=1.0)
    targets = parse_slo("ttft_p95<0.2, goodput>0.99")
    needed, runs = replicas_needed(lambda number: simulate(MACHINE, arrivals, number), targets, 64)
    assert 2 < needed < 64
    assert all(target.is_met(runs[needed]) for target in targets)
    fewer = simulate(MACHINE, arrivals, needed - 1)
    assert not all(target.is_met(fewer) for target in targets)


def test_too_few_replicas_are_said_to_be_too_few():
    needed, runs = replicas_needed(
        lambda number: simulate(MACHINE, traffic(60.0, 1.0), number), parse_slo("e2e_p99<0.001"), 5
    )
    assert needed is None
    assert sorted(runs) == [1, 2, 4, 5]


def test_what_is_never_served_took_for_ever():
    run = simulate(replace(MACHINE, max_waiting_requests=0), traffic(60.0, 2.0))
    (target,) = parse_slo("ttft_p99<1e3")
    assert not target.is_met(run)


@pytest.mark.parametrize("text", ["", "ttft<1", "ttft_p95>1", "goodput<1", "itl_p90<1", "ttft_p95<", "ttft_p95<1,,"])
def test_an_objective_that_is_none_is_an_error_that_says_how_to_write_one(text: str):
    with pytest.raises(ValueError, match="is no objective; write"):
        parse_slo(text)
