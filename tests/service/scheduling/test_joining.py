"""Which prompts are read in one run."""

import random
from itertools import combinations

import pytest

from service.scheduling.config import SchedulerConfig
from service.scheduling.joining import PADDING, best_group
from service.scheduling.plan import Chunk, Sample
from service.scheduling.request import Request
from service.scheduling.scheduler import Scheduler
from service.scheduling.work import Phase, Work, plan_work, prefill_work, prompts_work


def seconds_of(phase: Phase, work: Work) -> float:
    return 7e-3 * work.runs + 2.5e-4 * work.tokens + 3e-7 * work.attended


def prompt_in(slot: int, length: int, max_tokens: int = 64) -> Chunk:
    request = Request(request_id=f"in {slot}", prompt=(1,) * length, max_tokens=max_tokens, arrival=0.0)
    return Chunk(request.request_id, slot, 0, request.prompt, Sample(request, length, 0))


def gain(group: tuple[Chunk, ...]) -> float:
    lengths = [len(prompt.token_ids) for prompt in group]
    apart = sum(seconds_of("prefill", prefill_work(0, length)) for length in lengths)
    return apart - seconds_of("prefill", prompts_work(lengths))


def may_be_joined(group: tuple[Chunk, ...]) -> bool:
    lengths = [len(prompt.token_ids) for prompt in group]
    rooms = [
        -(-(length + prompt.sample.request.max_tokens) // 16) * 16
        for length, prompt in zip(lengths, group, strict=True)
    ]
    neighbours = group[-1].slot - group[0].slot == len(group) - 1
    padding = 1 - sum(lengths) / (len(lengths) * max(lengths))
    return neighbours and max(lengths) <= min(rooms) and padding <= PADDING + 1e-12


@pytest.mark.parametrize("seed", range(40))
def test_no_other_group_of_neighbours_gains_more(seed: int) -> None:
    rng = random.Random(seed)
    slots = rng.sample(range(10), rng.randint(0, 7))
    prompts = [prompt_in(slot, rng.choice([2, 20, 40, 48, 60, 64, 200]), rng.choice([1, 8, 64])) for slot in slots]
    chosen = best_group(prompts, seconds_of)
    ordered = sorted(prompts, key=lambda prompt: prompt.slot)
    others = [group for size in range(2, len(ordered) + 1) for group in combinations(ordered, size)]
    gains = [gain(group) for group in others if may_be_joined(group)]
    if not chosen:
        assert max(gains, default=0.0) <= 0
        return
    assert may_be_joined(chosen)
    assert gain(chosen) == pytest.approx(max(gains))


def test_nothing_is_joined_while_nothing_is_known_or_where_a_run_costs_nothing() -> None:
    prompts = [prompt_in(0, 40), prompt_in(1, 40)]
    assert best_group(prompts, lambda phase, work: None) == ()
    assert best_group(prompts, lambda phase, work: 1e-4 * work.tokens) == ()
    assert [prompt.slot for prompt in best_group(prompts, seconds_of)] == [0, 1]


def test_prompts_that_come_at_once_share_a_run_with_the_best_neighbours() -> None:
    config = SchedulerConfig(num_slots=6, capacity=512, kv_budget=6 * 512, idle_chunk_tokens=512, joins_prompts=True)
    scheduler = Scheduler(config, seconds_of)
    for name, length in (("a", 40), ("b", 44), ("long", 200), ("c", 48), ("d", 40)):
        scheduler.add(Request(request_id=name, prompt=(1,) * length, max_tokens=8, arrival=0.0))
    plan = scheduler.schedule(0.0)
    assert [prompt.request_id for prompt in plan.prompts] == ["a", "b"]
    assert {chunk.request_id for chunk in plan.chunks} == {"long", "c", "d"}
    assert plan.prompt_padding == 4
    assert plan_work(plan)["prefill"].runs == 4


def test_a_prompt_that_would_leave_a_lone_query_is_read_alone() -> None:
    config = SchedulerConfig(num_slots=2, capacity=64, kv_budget=128, joins_prompts=True)
    scheduler = Scheduler(config, seconds_of)
    for name, length in (("a", 40), ("lone", 49)):
        scheduler.add(Request(request_id=name, prompt=(1,) * length, max_tokens=8, arrival=0.0))
    assert scheduler.schedule(0.0).prompts == ()
