"""What a scheduler does with what it foresees: whom it refuses, whom it lets join, how it cuts prompts, who goes first.

Everything runs in virtual time: the laws are exactly what the scheduler foresees with.
"""

import itertools
import random
from collections import Counter
from dataclasses import replace
from statistics import median

import pytest

from service.scheduling.config import SchedulerConfig
from service.simulation.fleet import simulate
from service.simulation.replica import Ending, Machine, Outcome
from service.simulation.trace import Arrival
from service.simulation.virtual_engine import Laws

LAWS = Laws({"prefill": (0.0045, 0.00029, 2e-7), "decode": (0.0044, 0.0005, 1.8e-6)})
TARGET = 0.05
TAUGHT = 20  # answers that are needed before it is known how long answers are
LATER = 60.0  # seconds, when they are over


def machine(num_slots: int = 8, **changes: object) -> Machine:
    limits = {"num_slots": num_slots, "capacity": 2048, "kv_budget": num_slots * 2048, "inter_token_target": TARGET}
    return Machine(config=SchedulerConfig(**{**limits, **changes}), laws=LAWS, overhead_seconds=0.0002)


def arrival(at: float, prompt_tokens: int, output_tokens: int, **fields: object) -> Arrival:
    return Arrival(arrival_seconds=at, prompt_tokens=prompt_tokens, output_tokens=output_tokens, **fields)


def alone(asked: Arrival) -> float:
    (outcome,) = simulate(machine(), [replace(asked, arrival_seconds=0.0, budget_seconds=None)]).outcomes
    assert outcome.e2e is not None
    return outcome.e2e


def run(asked: list[Arrival], at: Machine | None = None) -> list[Outcome]:
    """Teach how long answers are, then ask, and return what became of it."""
    lesson = [arrival(2.0 * number, 20, 20) for number in range(TAUGHT)]
    later = [replace(one, arrival_seconds=one.arrival_seconds + LATER) for one in asked]
    return simulate(at or machine(), [*lesson, *later]).outcomes[TAUGHT:]


def mix(number: int, rate: float, seed: int) -> list[Arrival]:
    """95 % short and 5 % long prompts, three times as much time as each needs alone, bursts of four times the rate."""
    draw, now, asked = random.Random(seed), 0.0, []
    for _ in range(number):
        now += draw.expovariate(rate * (4 if now % 20 < 5 else 1))
        if draw.random() < 0.05:
            one = arrival(now, draw.randrange(900, 1700), draw.randrange(30, 150))
        else:
            one = arrival(now, int(min(400, draw.lognormvariate(4, 0.6))) + 1, int(draw.lognormvariate(3.4, 0.6)) + 1)
        asked.append(replace(one, budget_seconds=3 * alone(one)))
    return asked


def endings(outcomes: list[Outcome]) -> Counter[Ending | None]:
    return Counter(outcome.ending for outcome in outcomes)


def test_a_request_that_cannot_be_in_time_is_refused_when_it_comes() -> None:
    running = arrival(0.0, 50, 200)
    hopeless = arrival(0.5, 800, 100, budget_seconds=0.5 * alone(arrival(0.0, 800, 100)))
    outcomes = run([running, hopeless])
    assert [outcome.ending for outcome in outcomes] == [Ending.FINISHED, Ending.REFUSED]
    assert outcomes[1].num_tokens == 0
    assert outcomes[1].wait_seconds < TARGET, "before the next step"


def test_nothing_is_refused_by_an_idle_machine_or_before_it_is_known_how_long_answers_are() -> None:
    hopeless = arrival(0.5, 800, 100, budget_seconds=0.01)
    assert endings(run([hopeless])) == {Ending.EXPIRED: 1}
    untaught = simulate(machine(), [arrival(0.0, 50, 200), hopeless]).outcomes
    assert endings(untaught) == {Ending.FINISHED: 1, Ending.EXPIRED: 1}


def test_what_can_be_in_time_is_not_refused() -> None:
    """Half as many as the machine can serve, none with less than three times the time that it needs alone."""
    asked = [arrival(at, 40, 30) for at in itertools.accumulate([0.25] * 200)]
    budget = 3 * alone(asked[0])
    outcomes = run([replace(one, budget_seconds=budget) for one in asked])
    assert all(outcome.is_on_time for outcome in outcomes)


@pytest.mark.parametrize("seed", range(3))
def test_under_overload_more_are_in_time_than_first_come_first_served(seed) -> None:
    asked = mix(300, rate=4.0, seed=seed)
    ours = run(asked, machine(32))
    fixed = machine(32, inter_token_target=0.0, chunk_tokens=512)
    theirs = run(asked, replace(fixed, sends_deadlines=False))
    in_time, in_time_there = (sum(outcome.is_on_time for outcome in outcomes) for outcomes in (ours, theirs))
    assert in_time > 1.2 * in_time_there
    started = [outcome for outcome in ours if outcome.num_tokens]
    assert sum(outcome.is_on_time for outcome in started) > 0.9 * len(started), "who was let in is finished in time"
    long = [outcome for outcome in ours if outcome.arrival.prompt_tokens >= 900]
    assert any(outcome.is_on_time for outcome in long), "and not the short ones alone"


def test_beside_a_stream_long_prompts_are_read_in_steps_of_the_target() -> None:
    stream, prompt = run([arrival(0.0, 50, 400), arrival(0.5, 1500, 2)])
    assert max(stream.gaps) <= TARGET + 0.001
    assert prompt.ttft is not None and prompt.ttft < 2 * alone(arrival(0.0, 1500, 1))
    fixed, _ = run([arrival(0.0, 50, 400), arrival(0.5, 1500, 2)], machine(inter_token_target=0.0, chunk_tokens=512))
    assert max(fixed.gaps) > 2 * TARGET, "as it is with chunks of a fixed size"


def test_a_long_prompt_does_not_make_a_running_request_late_that_has_little_time() -> None:
    short = arrival(0.0, 50, 60)
    tight = replace(short, budget_seconds=1.6 * alone(short))
    outcomes = run([tight, arrival(0.05, 1500, 20)])
    assert outcomes[0].is_on_time
    assert outcomes[1].ending is Ending.FINISHED


def test_rows_that_fill_a_bucket_are_foreseen_as_well() -> None:
    costly = Laws({"prefill": (0.001, 0.0, 0.0), "decode": (0.0, 0.01, 0.0)})
    tight = replace(arrival(0.0, 4, 50), budget_seconds=1.4)  # 0.5 s alone, and 1 s beside one other
    asked = [tight, arrival(0.05, 4, 50)]
    beside, _ = run(asked, replace(machine(inter_token_target=0.0), laws=costly))
    before, after = run(asked, replace(machine(inter_token_target=0.0, row_buckets=(1, 8)), laws=costly))
    assert beside.is_on_time and before.is_on_time
    assert after.ending is Ending.FINISHED and after.e2e > 0.9, "beside it every step would take 8 rows"


def test_the_same_deadline_is_missed_where_nothing_is_foreseen() -> None:
    short = arrival(0.0, 50, 60)
    tight = replace(short, budget_seconds=1.6 * alone(short))
    outcomes = run([tight, arrival(0.05, 1500, 20)], machine(inter_token_target=0.0, chunk_tokens=512))
    assert not outcomes[0].is_on_time


def test_nobody_waits_for_ever_behind_more_urgent_requests() -> None:
    """The more urgent ones alone are more than the machine can serve."""
    urgent = [arrival(0.08 * number, 30, 40, priority=1) for number in range(600)]
    outcomes = run([*urgent[:4], arrival(0.25, 30, 40), *urgent[4:]], machine(2, ageing=2.0))
    assert endings(outcomes) == {Ending.FINISHED: 601}
    assert 1.0 < outcomes[4].wait_seconds < 10.0
    assert max(outcome.wait_seconds for outcome in outcomes) > 20.0


def test_requests_without_a_deadline_are_not_passed_for_ever_by_those_with_one() -> None:
    hurried = [arrival(0.1 * number, 200, 30, budget_seconds=2.0) for number in range(900)]
    patient = arrival(1.0, 600, 30)
    outcomes = run(sorted([*hurried, patient], key=lambda one: one.arrival_seconds), machine(4))
    (found,) = [outcome for outcome in outcomes if outcome.arrival.budget_seconds is None]
    assert found.ending is Ending.FINISHED
    assert found.wait_seconds < 30.0


def test_tenants_share_the_engine_whatever_they_ask_for() -> None:
    """One asks for four times as much as there is, the other for nearly half of it."""
    greedy = [arrival(0.025 * number, 60, 60, tenant="greedy") for number in range(800)]
    modest = [arrival(0.25 * number, 60, 60, tenant="modest") for number in range(80)]
    crowd = sorted([*greedy, *modest], key=lambda one: one.arrival_seconds)
    outcomes = run(crowd, replace(machine(4), max_waiting_requests=1000))
    assert endings(outcomes) == {Ending.FINISHED: 880}
    waits = {
        tenant: [one.wait_seconds for one in outcomes if one.arrival.tenant == tenant]
        for tenant in ("greedy", "modest")
    }
    assert max(waits["modest"]) < 4.0
    assert median(waits["greedy"]) > 20.0
