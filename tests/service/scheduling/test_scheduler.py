"""The scheduler, alone with a virtual engine whose tokens can be predicted.

The virtual engine keeps the tokens of every slot like a KV cache does, and answers each sample with a hash of all that
its slot holds: a token that was fed to the wrong slot, at the wrong position, twice or not at all changes the answer.
"""

import hashlib
import random
from collections.abc import Sequence

import pytest

from service.scheduling.invariants import violations
from service.scheduling.plan import Event, FailureEvent, StepPlan, StepResult, TokenEvent
from service.scheduling.request import FinishReason, Request, Token
from service.scheduling.scheduler import Scheduler, SchedulerConfig, chunk_length

EOS = 7
STOP = 8


def next_token(context: Sequence[int]) -> int:
    """The virtual model: a pure function of everything before."""
    return hashlib.sha256(",".join(map(str, context)).encode()).digest()[0] % 64


class VirtualEngine:
    """Remembers tokens by slot, as a KV cache remembers their states."""

    def __init__(self, num_slots: int) -> None:
        self.slots: list[list[int]] = [[] for _ in range(num_slots)]

    def execute(self, plan: StepPlan) -> StepResult:
        tokens = {}
        for slot in plan.releases:
            self.slots[slot] = []
        for move in plan.moves:
            assert len(self.slots[move.source]) >= move.length
            self.slots[move.destination] = self.slots[move.source][: move.length]
        for slot, row in enumerate(plan.rows):
            self._write(slot, row.length - 1, [row.token_id])
            if row.sample is not None:
                assert row.sample.position == row.length
                tokens[row.sample.request.request_id] = Token(next_token(self.slots[slot]))
        if (chunk := plan.chunk) is not None:
            self._write(chunk.slot, chunk.start, chunk.token_ids)
            if chunk.sample is not None:
                tokens[chunk.request_id] = Token(next_token(self.slots[chunk.slot]))
        return StepResult(tokens=tokens, failures={})

    def _write(self, slot: int, start: int, token_ids: Sequence[int]) -> None:
        # A parked free slot restarts at position 0; a sequence always continues where it was.
        assert start <= len(self.slots[slot])
        self.slots[slot][start:] = token_ids


def oracle(request: Request) -> tuple[list[int], FinishReason]:
    """What the request must get, whoever else is there."""
    output: list[int] = []
    while True:
        token = next_token((*request.prompt, *output))
        output.append(token)
        if token in request.stop_token_ids:
            return output, FinishReason.STOP
        if token in request.eos_token_ids:
            return output, FinishReason.EOS
        if len(output) == request.max_tokens:
            return output, FinishReason.LENGTH


def make_request(name: str, prompt_length: int, max_tokens: int, **fields: object) -> Request:
    prompt = tuple(random.Random(name).randrange(64) for _ in range(prompt_length))
    settings = {"arrival": 0.0, "eos_token_ids": frozenset({EOS}), **fields}
    return Request(request_id=name, prompt=prompt, max_tokens=max_tokens, **settings)


def config(**changes: int) -> SchedulerConfig:
    fields = {"num_slots": 4, "capacity": 128, "kv_budget": 512, "chunk_tokens": 8, "idle_chunk_tokens": 16}
    return SchedulerConfig(**{**fields, **changes})


class Walk:
    """Drives a scheduler and its virtual engine and checks every event and every invariant."""

    def __init__(self, settings: SchedulerConfig) -> None:
        self.scheduler = Scheduler(settings)
        self.engine = VirtualEngine(settings.num_slots)
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, FinishReason] = {}
        self.now = 0.0

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.check()

    def cancel(self, name: str) -> bool:
        cancelled = self.scheduler.cancel(name)
        self.check()
        return cancelled

    def step(self, cancel_midway: Sequence[str] = ()) -> list[Event]:
        plan = self.scheduler.schedule(self.now)
        self.check()
        result = self.engine.execute(plan)
        for name in cancel_midway:
            self.cancel(name)
        self.now += 1.0
        events = self.scheduler.update(plan, result, self.now)
        self.check()
        for event in events:
            assert isinstance(event, TokenEvent)
            name = event.request.request_id
            assert name not in self.finished, "an event after the last"
            self.outputs.setdefault(name, []).append(event.token.token_id)
            assert event.is_first == (len(self.outputs[name]) == 1)
            if event.finish is not None:
                self.finished[name] = event.finish.reason
        return events

    def check(self) -> None:
        assert violations(self.scheduler.snapshot()) == []


def test_one_request_gets_what_the_model_says() -> None:
    walk = Walk(config())
    request = make_request("alone", 21, 10, eos_token_ids=frozenset())
    walk.add(request)
    while walk.scheduler.has_work:
        walk.step()
    assert (walk.outputs["alone"], walk.finished["alone"]) == oracle(request)


@pytest.mark.parametrize("seed", range(30))
def test_in_a_random_walk_every_request_gets_exactly_what_it_gets_alone(seed: int) -> None:
    rng = random.Random(seed)
    capacity = rng.choice([24, 64, 128])
    slots = rng.randint(1, 6)
    settings = config(
        num_slots=slots,
        capacity=capacity,
        kv_budget=rng.randint(-(-capacity // 16) * 16, slots * 128),
        chunk_tokens=rng.randint(4, 20),
        idle_chunk_tokens=rng.randint(4, 40),
    )
    walk = Walk(settings)
    requests: dict[str, Request] = {}
    cancelled: set[str] = set()
    for operation in range(400):
        alive = sorted(set(requests) - set(walk.finished) - cancelled)
        choice = rng.random()
        if choice < 0.25 and len(alive) < 12:
            prompt = rng.randint(1, capacity - 1)
            request = make_request(
                f"{seed}-{operation}",
                prompt,
                rng.randint(1, capacity - prompt),
                arrival=walk.now,
                priority=rng.randint(-1, 1),
                stop_token_ids=frozenset({STOP} if rng.random() < 0.5 else ()),
            )
            requests[request.request_id] = request
            walk.add(request)
        elif choice < 0.35 and alive:
            victim = rng.choice(alive)
            assert walk.cancel(victim)
            cancelled.add(victim)
        elif choice < 0.4 and alive:
            victim = rng.choice(alive)
            walk.step(cancel_midway=[victim])
            cancelled.add(victim)
        elif choice > 0.97 and not walk.scheduler.has_work:
            walk.engine.execute(walk.scheduler.release_idle())
            walk.check()
        else:
            walk.step()
    while walk.scheduler.has_work:
        walk.step()
    for name, request in requests.items():
        tokens, reason = oracle(request)
        if name in walk.finished:
            assert (walk.outputs[name], walk.finished[name]) == (tokens, reason)
        else:
            assert name in cancelled
            assert walk.outputs.get(name, []) == tokens[: len(walk.outputs.get(name, []))]
    walk.scheduler.release_idle()
    last = walk.scheduler.snapshot()
    assert (last.committed, last.reserved, last.sequences) == (0, 0, ())
    assert last.free_slots == set(range(slots))


@pytest.mark.parametrize("limit", range(4, 40))
def test_no_chunk_of_a_longer_prompt_leaves_a_query_alone(limit: int) -> None:
    for length in range(2, 200):
        remaining, sizes = length, []
        while remaining:
            sizes.append(chunk_length(remaining, limit))
            remaining -= sizes[-1]
        assert min(sizes) >= 2
        assert all(size % 16 != 1 for size in sizes)
        assert max(sizes) <= limit
    assert chunk_length(1, limit) == 1


def test_decode_rows_are_closed_up_when_a_row_finishes_and_nobody_waits() -> None:
    walk = Walk(config())
    for name, max_tokens in (("short", 2), ("long", 30), ("longer", 30)):
        walk.add(make_request(name, 4, max_tokens, eos_token_ids=frozenset()))
    while "short" not in walk.finished:
        walk.step()
    plan = walk.scheduler.schedule(walk.now)
    assert len(plan.moves) <= 1
    walk.engine.execute(plan)
    assert len(plan.rows) == sum(row.sample is not None for row in plan.rows)


def test_a_waiting_request_takes_the_hole_instead_of_a_copy() -> None:
    walk = Walk(config(num_slots=2))
    walk.add(make_request("first", 4, 2, eos_token_ids=frozenset()))
    walk.add(make_request("second", 4, 40, eos_token_ids=frozenset()))
    walk.add(make_request("third", 4, 3, eos_token_ids=frozenset()))
    while "first" not in walk.finished:
        walk.step()
    plan = walk.scheduler.schedule(walk.now)
    assert plan.moves == ()
    assert plan.chunk is not None
    assert (plan.chunk.request_id, plan.chunk.slot) == ("third", 0)


def test_urgent_requests_go_first_and_equal_ones_in_order_of_arrival() -> None:
    walk = Walk(config(num_slots=1))
    for name, arrival, priority in (("late", 2.0, 0), ("early", 1.0, 0), ("urgent", 3.0, 5)):
        walk.add(make_request(name, 4, 1, arrival=arrival, priority=priority))
    order = []
    while walk.scheduler.has_work:
        order += [event.request.request_id for event in walk.step()]
    assert order == ["urgent", "early", "late"]


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_memory() -> None:
    walk = Walk(config(capacity=64, kv_budget=64))
    walk.add(make_request("running", 16, 16, eos_token_ids=frozenset()))
    walk.step()
    walk.add(make_request("large", 30, 30, arrival=1.0))
    walk.add(make_request("small", 4, 4, arrival=2.0))
    walk.step()
    assert walk.scheduler.snapshot().num_running == 1


def test_a_failure_ends_its_own_request_only() -> None:
    walk = Walk(config())
    for name in ("poison", "healthy"):
        walk.add(make_request(name, 4, 9, eos_token_ids=frozenset()))
    for _ in range(3):
        walk.step()
    plan = walk.scheduler.schedule(walk.now)
    result = walk.engine.execute(plan)
    failed = StepResult(
        tokens={name: token for name, token in result.tokens.items() if name != "poison"},
        failures={"poison": "the graph failed"},
    )
    events = walk.scheduler.update(plan, failed, walk.now)
    walk.check()
    assert [type(event) for event in events if event.request.request_id == "poison"] == [FailureEvent]
    walk.outputs["healthy"] += [e.token.token_id for e in events if isinstance(e, TokenEvent)]
    while walk.scheduler.has_work:
        walk.step()
    assert walk.outputs["healthy"] == oracle(make_request("healthy", 4, 9, eos_token_ids=frozenset()))[0]


def test_times_add_up() -> None:
    walk = Walk(config())
    walk.now = 5.0
    walk.add(make_request("timed", 20, 3, arrival=2.0, eos_token_ids=frozenset()))
    events = []
    while walk.scheduler.has_work:
        events += walk.step()
    finish = events[-1].finish
    assert finish is not None
    assert finish.queue_seconds == 3.0
    assert finish.prefill_seconds == 2.0  # two chunks, 16 and 4
    assert finish.decode_seconds == 2.0
    assert [event.gap_seconds for event in events] == [5.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("field", "value"), [("num_slots", 0), ("capacity", 1), ("chunk_tokens", 3), ("kv_budget", 127)]
)
def test_a_config_that_cannot_work_is_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        config(**{field: value})
