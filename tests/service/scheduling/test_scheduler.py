"""The scheduler, alone with a virtual engine whose tokens can be predicted.

The virtual engine keeps the tokens of every slot like a KV cache does, and the source that the slot began with. It
answers each sample with a hash of all that its slot holds: a token that was fed to the wrong slot, at the wrong
position, twice or not at all changes the answer, and so does a copy that came too late.
"""

import hashlib
import math
import random
from collections.abc import Sequence, Set
from dataclasses import replace

import pytest
import torch

from models.beam import BeamSearch, search
from service.scheduling.config import SchedulerConfig
from service.scheduling.invariants import violations
from service.scheduling.plan import Event, FailureEvent, Release, Sample, SearchEvent, StepPlan, StepResult, TokenEvent
from service.scheduling.request import Beam, FinishReason, Hypothesis, Request, Source, Token
from service.scheduling.row_buckets import row_buckets
from service.scheduling.scheduler import Scheduler, chunk_length
from service.scheduling.slots import rounded
from service.scheduling.work import Phase, Work

EOS = 7
STOP = 8
TRUNK = tuple(random.Random("trunk").choices(range(64), k=128))


def next_token(context: Sequence[int], source: Source | None = None) -> int:
    """The virtual model: a pure function of everything before."""
    return _digest(context, source)[0] % 64


def next_distribution(context: Sequence[int], source: Source | None = None) -> list[float]:
    """Log-probabilities of a vocabulary of 12, in which `EOS` is no rarer than others."""
    digest = _digest(context, source)
    weights = [1 + 256 * digest[i] + digest[12 + i] for i in range(12)]  # hardly ever two alike
    return [math.log(weight / sum(weights)) for weight in weights]


def _digest(context: Sequence[int], source: Source | None) -> bytes:
    about = source.token_ids if source else ()
    return hashlib.sha256(",".join(map(str, (*about, "|", *context))).encode()).digest()


class VirtualEngine:
    """Remembers tokens by slot, as a KV cache remembers their states."""

    def __init__(self, num_slots: int) -> None:
        self.slots: list[list[int]] = [[] for _ in range(num_slots)]
        self.sources: list[Source | None] = [None] * num_slots

    def execute(self, plan: StepPlan) -> StepResult:
        tokens = {}
        for change in plan.memory:
            if isinstance(change, Release):
                self.slots[change.slot] = []
                continue
            assert len(self.slots[change.source]) >= change.length
            self.slots[change.destination] = self.slots[change.source][: change.length]
            self.sources[change.destination] = self.sources[change.source]
        for encode in plan.encodes:
            self.slots[encode.slot] = []
            self.sources[encode.slot] = encode.source
        for slot, row in enumerate(plan.rows, plan.first_slot):
            self._write(slot, row.length - 1, [row.token_id])
            if row.sample is not None:
                assert row.sample.position == row.length
                tokens[slot] = self._sample(slot, row.sample)
        self._check_prompts(plan)
        for chunk in plan.reads:
            self._write(chunk.slot, chunk.start, chunk.token_ids)
            if chunk.sample is not None:
                tokens[chunk.slot] = self._sample(chunk.slot, chunk.sample)
        return StepResult(tokens=tokens, failures={})

    @staticmethod
    def _check_prompts(plan: StepPlan) -> None:
        """Whole prompts of neighbouring slots, at least two, with room for the padding, and nothing is read twice."""
        prompts = plan.prompts
        assert len(prompts) != 1
        assert [prompt.slot for prompt in prompts] == [prompts[0].slot + i for i in range(len(prompts))]
        longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
        for prompt in prompts:
            assert prompt.start == 0 and prompt.sample is not None
            assert longest <= rounded(prompt.sample.request.max_total_tokens)
        assert len({chunk.request_id for chunk in plan.reads}) == len(plan.reads)

    def _sample(self, slot: int, sample: Sample) -> Token:
        source = self.sources[slot] if sample.request.source else None
        if (beam := sample.request.beam) is None:
            return Token(next_token(self.slots[slot], source))
        scored = enumerate(next_distribution(self.slots[slot], source))
        top = sorted(scored, key=lambda pair: -pair[1])[: 2 * beam.width]
        return Token(top[0][0], top[0][1], tuple(top))

    def _write(self, slot: int, start: int, token_ids: Sequence[int]) -> None:
        # A parked free slot restarts at position 0; a sequence always continues where it was.
        assert start <= len(self.slots[slot])
        self.slots[slot][start:] = token_ids


def oracle(request: Request) -> tuple[list[int], FinishReason]:
    """What the request must get, whoever else is there."""
    output: list[int] = []
    while True:
        token = next_token((*request.prompt, *output), request.source)
        output.append(token)
        if token in request.stop_token_ids:
            return output, FinishReason.STOP
        if token in request.eos_token_ids:
            return output, FinishReason.EOS
        if len(output) == request.max_tokens:
            return output, FinishReason.LENGTH


class VirtualModel:
    """The virtual model as the oracle of beam search takes it; its state is the tokens of each row."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def encode(self, source: torch.Tensor, source_lengths: None = None) -> torch.Tensor:
        return source

    def begin(self, memory: torch.Tensor, source_lengths: None, capacity: int) -> "VirtualState":
        return VirtualState([list(self.request.prompt[:-1])])

    def decode(self, token_ids: torch.Tensor, state: "VirtualState") -> tuple[torch.Tensor, "VirtualState"]:
        rows = [[*row, int(token)] for row, token in zip(state.rows, token_ids[:, 0], strict=True)]
        logits = [next_distribution(row, self.request.source) for row in rows]
        return torch.tensor(logits, dtype=torch.float64)[:, None].float(), VirtualState(rows)


class VirtualState:
    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def select(self, rows: torch.Tensor) -> "VirtualState":
        return VirtualState([self.rows[row] for row in rows.tolist()])


def beam_oracle(request: Request) -> list[tuple[tuple[int, ...], float]]:
    """The answers of a search without a scheduler: their tokens, the end token left out, and their scores."""
    beam = request.beam
    assert beam is not None
    options = BeamSearch(
        width=beam.width,
        max_tokens=request.max_tokens,
        start_token_id=request.prompt[-1],
        end_token_id=EOS,
        length_penalty=beam.length_penalty,
    )
    (found,) = search(VirtualModel(request), torch.zeros(1, 1), None, options)
    return [(one.token_ids, one.score) for one in found[: beam.num_answers]]


def make_request(name: str, prompt_length: int, max_tokens: int, **fields: object) -> Request:
    prompt = tuple(random.Random(name).randrange(64) for _ in range(prompt_length))
    settings = {"arrival": 0.0, "eos_token_ids": frozenset({EOS}), **fields}
    return Request(request_id=name, prompt=prompt, max_tokens=max_tokens, **settings)


def config(**changes: int) -> SchedulerConfig:
    fields = {"num_slots": 4, "capacity": 128, "kv_budget": 512, "chunk_tokens": 8, "idle_chunk_tokens": 16}
    return SchedulerConfig(**{**fields, **changes})


def seconds_of(phase: Phase, work: Work) -> float:
    """A law under which it pays to read prompts together."""
    return 1e-3 * work.runs + 1e-5 * work.tokens


class Walk:
    """Drives a scheduler and its virtual engine and checks every event and every invariant.

    Args:
        settings: of the scheduler.
        ahead: whether each step is planned, where that can be, before the scheduler hears what came of the last.
    """

    def __init__(self, settings: SchedulerConfig, *, ahead: bool = False) -> None:
        self.ahead = ahead
        self.planned: StepPlan | None = None
        self.num_planned = 0
        self.scheduler = Scheduler(settings, seconds_of if settings.joins_prompts else None)
        self.engine = VirtualEngine(settings.num_slots)
        self.outputs: dict[str, list[int]] = {}
        self.answers: dict[str, tuple[Hypothesis, ...]] = {}
        self.finished: dict[str, FinishReason] = {}
        self.now = 0.0

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.check()

    def cancel(self, name: str) -> bool:
        cancelled = self.scheduler.cancel(name)
        self.check()
        return cancelled

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.planned is not None

    def step(self, cancel_midway: Sequence[str] = (), fails: Set[str] = frozenset()) -> list[Event]:
        plan = self.plan()
        result = self.engine.execute(plan)
        failures = dict.fromkeys(plan.request_ids & fails, "the graph failed")
        lost = plan.slots(failures.keys())
        tokens = {slot: token for slot, token in result.tokens.items() if slot not in lost}
        for slot in lost:  # where the engine may have put itself to the test
            self.engine.slots[slot] = [99] * self.scheduler.config.capacity
        result = replace(result, tokens=tokens, failures=failures)
        self.check_prefixes()
        if self.ahead and self.scheduler.can_plan_ahead:
            self.scheduler.advance(plan)
            self.check()
            self.planned = self.scheduler.schedule(self.now)
            self.check()
            self.check_rows(self.planned)
        else:
            for name in cancel_midway:
                self.cancel(name)
        self.now += 1.0
        events = self.scheduler.update(plan, result, self.now)
        self.check()
        if self.planned is not None:
            self.planned = self.scheduler.still_to_do(self.planned)
            for name in cancel_midway:  # what was planned for them is not done any more
                self.cancel(name)
        assert {event.request.request_id for event in events if isinstance(event, FailureEvent)} == {*failures}
        for event in events:
            if isinstance(event, FailureEvent):
                continue
            name = event.request.request_id
            assert name not in self.finished, "an event after the last"
            if isinstance(event, SearchEvent):
                self.answers[name] = event.finish.hypotheses
                self.finished[name] = event.finish.reason
                continue
            self.outputs.setdefault(name, []).append(event.token.token_id)
            assert event.is_first == (len(self.outputs[name]) == 1)
            if event.finish is not None:
                self.finished[name] = event.finish.reason
        return events

    def plan(self) -> StepPlan:
        """Return what is to be done of the step that was planned ahead, or plan one."""
        planned, self.planned = self.planned, None
        if planned is not None:
            planned = self.scheduler.still_to_do(planned)
        if planned is not None:
            self.num_planned += 1
            assert planned.request_ids <= {view.request_id for view in self.scheduler.snapshot().sequences}
            return planned
        self.check_prefixes()
        plan = self.scheduler.schedule(self.now)
        self.check()
        self.check_rows(plan)
        return plan

    def check_prefixes(self) -> None:
        """A free slot holds what others are told to begin with."""
        for slot in self.scheduler.snapshot().free_slots:
            prefix = self.scheduler._prefixes[slot]
            assert tuple(self.engine.slots[slot][: prefix.length]) == prefix.prompt[: prefix.length], slot

    def check_rows(self, plan: StepPlan) -> None:
        """The rows are as few as hold every real one; with buckets from slot 0 and in number one of them."""
        if not plan.rows:
            return
        real = [index for index, row in enumerate(plan.rows) if row.request_id is not None]
        buckets = self.scheduler.config.row_buckets
        if not buckets:
            assert (real[0], real[-1]) == (0, len(plan.rows) - 1)
            return
        assert plan.first_slot == 0 and len(plan.rows) in buckets
        assert len(plan.rows) == min(size for size in buckets if size > real[-1])

    def check(self) -> None:
        snapshot, occupancy = self.scheduler.snapshot(), self.scheduler.occupancy()
        assert violations(snapshot) == []
        assert (occupancy.num_waiting, occupancy.num_running) == (snapshot.num_waiting, snapshot.num_running)
        uncomputed = (max(0, view.num_prompt - view.num_computed) for view in snapshot.sequences)
        assert occupancy.num_uncomputed == sum(uncomputed)
        assert (occupancy.reserved, occupancy.committed) == (snapshot.reserved, snapshot.committed)


def test_one_request_gets_what_the_model_says() -> None:
    walk = Walk(config())
    request = make_request("alone", 21, 10, eos_token_ids=frozenset())
    walk.add(request)
    while walk.has_work:
        walk.step()
    assert (walk.outputs["alone"], walk.finished["alone"]) == oracle(request)


def random_request(name: str, rng: random.Random, walk: Walk) -> Request:
    """Any request that fits, about a source or not, with a beam search or not: rarely so where that is in the way."""
    capacity = walk.scheduler.config.capacity
    while True:
        prompt = rng.randint(1, capacity - 1)
        source = tuple(rng.randrange(64) for _ in range(rng.randint(1, 9)))
        request = make_request(
            name,
            prompt,
            rng.randint(1, capacity - prompt),
            arrival=walk.now,
            priority=rng.randint(-1, 1),
            source=Source(source) if rng.random() < 0.5 else None,
            beam=Beam(width=rng.randint(1, 3)) if rng.random() < (0.03 if walk.ahead else 0.2) else None,
        )
        if request.beam is None and rng.random() < 0.5:
            request = replace(request, stop_token_ids=frozenset({STOP}))
        if rng.random() < 0.7:  # begins as others do
            shared = rng.randint(0, prompt)
            request = replace(request, prompt=(*TRUNK[:shared], *request.prompt[shared:]))
        if walk.scheduler.fits(request):
            return request


def assert_answered(walk: Walk, request: Request) -> None:
    """What a request has got is what it gets alone, or the beginning of that if it was cancelled."""
    name = request.request_id
    if request.beam is not None:
        if name in walk.finished:
            assert_found(walk.answers[name], request)
        return
    tokens, reason = oracle(request)
    if name in walk.finished:
        assert (walk.outputs[name], walk.finished[name]) == (tokens, reason)
    else:
        assert walk.outputs.get(name, []) == tokens[: len(walk.outputs.get(name, []))]


def assert_found(answers: Sequence[Hypothesis], request: Request) -> None:
    expected = beam_oracle(request)
    found = [tuple(token for token in one.token_ids if token != EOS) for one in answers]
    assert found == [tokens for tokens, _ in expected]
    assert [one.score for one in answers] == pytest.approx([score for _, score in expected], rel=1e-5)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_in_a_random_walk_every_request_gets_exactly_what_it_gets_alone(seed: int, ahead: bool) -> None:
    rng = random.Random(seed)
    capacity = rng.choice([24, 64, 128])
    slots = rng.randint(1, 6)
    settings = config(
        num_slots=slots,
        capacity=capacity,
        kv_budget=rng.randint(-(-capacity // 16) * 16, slots * 128),
        chunk_tokens=rng.randint(4, 20),
        idle_chunk_tokens=rng.randint(4, 40),
        prefill_chunk=(chunk := rng.choice([None, None, 1, 5])),
        window=(window := rng.choice([None, None, 20])),
        reuses_prefixes=chunk is None and window is None,
        joins_prompts=chunk is None and window is None and rng.random() < 0.7,
        row_buckets=[(), row_buckets(slots), tuple(sorted({(slots + 1) // 2, slots}))][seed % 3],
    )
    walk = Walk(settings, ahead=ahead)
    requests: dict[str, Request] = {}
    cancelled: set[str] = set()
    for operation in range(400):
        alive = sorted(set(requests) - set(walk.finished) - cancelled)
        choice = rng.random()
        if choice < 0.25 and len(alive) < 12:
            request = random_request(f"{seed}-{operation}", rng, walk)
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
        elif choice < 0.42 and alive:
            victim = rng.choice(alive)
            cancelled.update(
                event.request.request_id for event in walk.step(fails={victim}) if isinstance(event, FailureEvent)
            )
        elif choice > 0.97 and not walk.has_work:
            walk.engine.execute(walk.scheduler.release_idle())
            walk.check()
        else:
            walk.step()
    while walk.has_work:
        walk.step()
    for name, request in requests.items():
        assert name in walk.finished or name in cancelled
        assert_answered(walk, request)
    assert (walk.num_planned > 50) == ahead
    walk.scheduler.release_idle()
    last = walk.scheduler.snapshot()
    assert (last.committed, last.reserved, last.sequences) == (0, 0, ())
    assert last.free_slots == set(range(slots))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_beam_search_among_others_finds_what_it_finds_alone(width: int, length_penalty: float, ahead: bool) -> None:
    walk = Walk(config(num_slots=7, kv_budget=1024), ahead=ahead)
    requests = [
        make_request(
            f"search {number}",
            1 + 5 * (number % 2),
            2 + 3 * number,
            beam=Beam(width=width, length_penalty=length_penalty, num_answers=width),
            source=Source((number, 3)),
        )
        for number in range(4)
    ]
    walk.add(make_request("other", 9, 40, eos_token_ids=frozenset()))
    for request in requests:
        walk.add(request)
        walk.step()
    while walk.has_work:
        walk.step()
    for request in requests:
        assert_found(walk.answers[request.request_id], request)
    assert len(walk.outputs["other"]) == 40


def cached(walk: Walk, name: str, prompt: Sequence[int], max_tokens: int = 3) -> int:
    """Run a request to its end and return how many of its prompt's tokens were not computed."""
    walk.add(replace(make_request(name, 1, max_tokens, eos_token_ids=frozenset()), prompt=tuple(prompt)))
    events = []
    while name not in walk.finished:
        events += [event for event in walk.step() if event.request.request_id == name]
    assert (walk.outputs[name], walk.finished[name]) == oracle(events[0].request)
    return events[0].cached_tokens


def test_a_growing_conversation_is_not_computed_again_but_for_what_was_generated() -> None:
    walk = Walk(config(reuses_prefixes=True))
    first = TRUNK[:40]
    assert cached(walk, "first", first) == 0
    second = (*first, *walk.outputs["first"], *TRUNK[40:60])
    assert cached(walk, "second", second) == 40
    assert cached(walk, "third", (*second, *TRUNK[60:70])) == len(second)
    assert cached(walk, "the third again", (*second, *TRUNK[60:70])) == len(second) + 8, "two tokens are computed"
    assert cached(walk, "too little", (*first[:15], *reversed(TRUNK))[:60]) == 0


def test_conversations_one_after_the_other_do_not_displace_each_other() -> None:
    walk = Walk(config(num_slots=3, kv_budget=3 * 128, reuses_prefixes=True))
    talks = [tuple(random.Random(name).choices(range(64), k=30)) for name in "abcd"]
    for number, talk in enumerate(talks[:3]):
        assert cached(walk, f"begin {number}", talk) == 0
    for number, talk in enumerate(talks[:3]):
        assert cached(walk, f"go on {number}", (*talk, *TRUNK[:20])) == 30
    assert cached(walk, "a fourth", talks[3]) == 0
    assert cached(walk, "the last one still", (*talks[2], *TRUNK[:30])) == 50
    assert cached(walk, "the first no longer", (*talks[0], *TRUNK[:30])) == 0, "its slot was used longest ago"


def test_running_requests_lend_their_beginning() -> None:
    walk = Walk(config(num_slots=4, kv_budget=4 * 128, reuses_prefixes=True, idle_chunk_tokens=128))
    walk.add(replace(make_request("running", 1, 50, eos_token_ids=frozenset()), prompt=TRUNK[:64]))
    walk.step()
    for number in range(3):
        assert cached(walk, str(number), (*TRUNK[:50], number, number + 1, number + 2)) == 50
    while walk.has_work:
        walk.step()
    assert (
        walk.outputs["running"][:50]
        == oracle(replace(make_request("running", 1, 50, eos_token_ids=frozenset()), prompt=TRUNK[:64]))[0]
    )


def test_a_beginning_that_comes_while_a_slot_is_parked_is_not_written_over() -> None:
    """A prompt waits between two decode rows until another one has computed what both begin with."""
    walk = Walk(config(num_slots=4, kv_budget=4 * 128, reuses_prefixes=True))
    for name in ("low", "leaves", "high"):
        walk.add(make_request(name, 2, 60, eos_token_ids=frozenset()))
    for _ in range(4):
        walk.step()
    computes = make_request("computes", 1, 2, priority=1, eos_token_ids=frozenset())
    walk.add(replace(computes, prompt=TRUNK[:48]))
    walk.step()
    walk.cancel("leaves")
    waits = replace(computes, request_id="waits", priority=0, prompt=(*TRUNK[:40], TRUNK[40] ^ 1, 2, 3))
    walk.add(waits)
    events = []
    while walk.has_work:
        events += walk.step()
    (first,) = [event for event in events if event.request.request_id == "waits" and event.is_first]
    assert (walk.outputs["waits"], first.cached_tokens) == (oracle(waits)[0], 40)
    assert (walk.outputs["low"], walk.outputs["high"]) == tuple(
        oracle(make_request(name, 2, 60, eos_token_ids=frozenset()))[0] for name in ("low", "high")
    )


def test_nobody_begins_with_what_a_failed_request_left() -> None:
    walk = Walk(config(reuses_prefixes=True, idle_chunk_tokens=128))
    walk.add(replace(make_request("poison", 1, 9, eos_token_ids=frozenset()), prompt=TRUNK[:40]))
    walk.step()
    plan = walk.scheduler.schedule(walk.now)
    walk.engine.execute(plan)
    walk.scheduler.update(plan, StepResult(tokens={}, failures={"poison": "the graph failed"}), walk.now)
    assert cached(walk, "healthy", TRUNK[:40]) == 0


@pytest.mark.parametrize("fails_at", range(2, 10))
def test_nor_with_what_is_left_where_a_failed_request_was_about_to_move_from(fails_at: int) -> None:
    walk = Walk(config(row_buckets=(1, 2, 4), reuses_prefixes=True, idle_chunk_tokens=128), ahead=True)
    walk.add(make_request("ends", 2, 4, eos_token_ids=frozenset()))
    walk.add(replace(make_request("poison", 1, 20, eos_token_ids=frozenset()), prompt=TRUNK[:40]))
    for _ in range(fails_at):
        walk.step()
    walk.step(fails={"poison"})
    while walk.has_work:
        walk.step()
    cached(walk, "healthy", TRUNK[:40])  # and the right answer


def test_memory_that_is_given_back_is_no_beginning() -> None:
    walk = Walk(config(reuses_prefixes=True))
    assert cached(walk, "first", TRUNK[:40]) == 0
    walk.engine.execute(walk.scheduler.release_idle())
    assert cached(walk, "again", TRUNK[:40]) == 0


def test_a_search_wider_than_the_slots_can_never_run() -> None:
    assert not Scheduler(config(num_slots=3)).fits(make_request("wide", 4, 4, beam=Beam(width=4)))


def test_a_prompt_of_one_token_is_a_decode_row_and_short_prompts_share_a_step() -> None:
    walk = Walk(config(idle_chunk_tokens=16))
    for name, length in (("one", 1), ("first", 6), ("second", 7), ("too long", 8)):
        walk.add(make_request(name, length, 4))
    plan = walk.scheduler.schedule(0.0)
    assert [row.request_id for row in plan.rows] == ["one"]
    walk.engine.execute(plan)
    assert [chunk.request_id for chunk in plan.chunks] == ["first"], "beside a decode row 8 tokens are the limit"
    walk = Walk(config(idle_chunk_tokens=16))
    for name, length in (("first", 6), ("second", 7), ("too long", 8)):
        walk.add(make_request(name, length, 4))
    assert [chunk.request_id for chunk in walk.scheduler.schedule(0.0).chunks] == ["first", "second"]


def test_sources_are_read_before_their_prompts_and_as_many_as_the_limit_allows() -> None:
    walk = Walk(config(idle_chunk_tokens=16))
    for name in ("first", "second", "third"):
        walk.add(make_request(name, 1, 4, source=Source(tuple(range(7)))))
    plan = walk.scheduler.schedule(0.0)
    assert [encode.request_id for encode in plan.encodes] == ["first", "second"]
    assert plan.rows == plan.chunks == ()
    walk.scheduler.update(plan, walk.engine.execute(plan), 1.0)
    plan = walk.scheduler.schedule(1.0)
    assert [encode.request_id for encode in plan.encodes] == ["third"]
    assert [row.request_id for row in plan.rows] == ["first", "second"]


def test_a_prompt_is_cut_where_the_bundle_says_whatever_else_runs() -> None:
    walk = Walk(config(prefill_chunk=6))
    walk.add(make_request("running", 1, 100, eos_token_ids=frozenset()))
    walk.step()
    walk.add(make_request("cut", 15, 2))
    sizes = []
    while "cut" not in walk.finished:
        plan = walk.scheduler.schedule(walk.now)
        sizes += [len(chunk.token_ids) for chunk in plan.chunks]
        walk.now += 1
        for event in walk.scheduler.update(plan, walk.engine.execute(plan), walk.now):
            if event.finish is not None:
                walk.finished[event.request.request_id] = event.finish.reason
    assert sizes == [6, 6, 3]


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
    assert len(plan.memory) <= 1
    walk.engine.execute(plan)
    assert len(plan.rows) == sum(row.sample is not None for row in plan.rows)


def test_with_buckets_rows_are_moved_only_where_that_makes_a_smaller_step() -> None:
    walk = Walk(config(num_slots=4, row_buckets=(1, 2, 4)))
    for name, max_tokens in (("first", 2), ("second", 40), ("third", 40), ("fourth", 9)):
        walk.add(make_request(name, 4, max_tokens, eos_token_ids=frozenset()))
    while "first" not in walk.finished:
        walk.step()
    plan = walk.scheduler.schedule(walk.now)  # three of four: no smaller bucket holds them
    assert plan.memory == () and [row.request_id is None for row in plan.rows] == [True, False, False, False]
    walk.scheduler.update(plan, walk.engine.execute(plan), walk.now)
    while "fourth" not in walk.finished:
        walk.step()
    plan = walk.scheduler.schedule(walk.now)  # two of three: they fit into two
    assert len(plan.memory) == 1 and len(plan.rows) == 2 and all(row.request_id for row in plan.rows)


def test_buckets_that_do_not_rise_to_the_number_of_slots_are_refused() -> None:
    for buckets in ((1, 2), (2, 1, 4), (0, 4), (1, 2, 2, 4), (1, 2, 8)):
        with pytest.raises(ValueError, match=r"row_buckets is .* must rise from at least 1 to num_slots, 4"):
            config(row_buckets=buckets)


def test_a_waiting_request_takes_the_hole_instead_of_a_copy() -> None:
    walk = Walk(config(num_slots=2))
    walk.add(make_request("first", 4, 2, eos_token_ids=frozenset()))
    walk.add(make_request("second", 4, 40, eos_token_ids=frozenset()))
    walk.add(make_request("third", 4, 3, eos_token_ids=frozenset()))
    while "first" not in walk.finished:
        walk.step()
    plan = walk.scheduler.schedule(walk.now)
    assert plan.memory == ()
    assert [(chunk.request_id, chunk.slot) for chunk in plan.chunks] == [("third", 0)]


def test_urgent_requests_go_first_and_equal_ones_in_order_of_arrival() -> None:
    walk = Walk(config(num_slots=1))
    for name, arrival, priority in (("late", 2.0, 0), ("early", 1.0, 0), ("urgent", 3.0, 5)):
        walk.add(make_request(name, 4, 1, arrival=arrival, priority=priority))
    order = []
    while walk.has_work:
        order += [event.request.request_id for event in walk.step()]
    assert order == ["urgent", "early", "late"]


def test_of_equal_priority_the_earliest_deadline_goes_first_and_none_is_a_minute() -> None:
    walk = Walk(config(num_slots=1))
    deadlines = {"patient": 100.0, "hurried": 10.0, "silent": None, "late and silent": None}
    for number, (name, deadline) in enumerate(deadlines.items()):
        walk.add(make_request(name, 4, 1, arrival=0.1 * number, deadline=deadline))
    order = []
    while walk.has_work:
        order += [event.request.request_id for event in walk.step()]
    assert order == ["hurried", "silent", "late and silent", "patient"]


def test_what_is_past_its_deadline_costs_no_further_step() -> None:
    walk = Walk(config(num_slots=1))
    walk.add(make_request("running", 4, 50, deadline=2.5, eos_token_ids=frozenset()))
    walk.add(make_request("waiting", 4, 5, deadline=3.0, arrival=1.0))
    walk.add(make_request("unhurried", 4, 2, arrival=1.0, eos_token_ids=frozenset()))
    assert walk.scheduler.expire(2.0) == []
    for _ in range(3):
        walk.step()
    assert [(e.request.request_id, e.phase, e.num_tokens) for e in walk.scheduler.expire(3.0)] == [
        ("running", "decode", 3),
        ("waiting", "waiting", 0),
    ]
    walk.check()
    while walk.has_work:
        walk.step()
    assert walk.finished == {"unhurried": FinishReason.LENGTH}


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
        tokens={
            slot: token
            for slot, token in result.tokens.items()
            if plan.rows[slot - plan.first_slot].request_id != "poison"
        },
        failures={"poison": "the graph failed"},
    )
    events = walk.scheduler.update(plan, failed, walk.now)
    walk.check()
    assert [type(event) for event in events if event.request.request_id == "poison"] == [FailureEvent]
    walk.outputs["healthy"] += [e.token.token_id for e in events if isinstance(e, TokenEvent)]
    while walk.has_work:
        walk.step()
    assert walk.outputs["healthy"] == oracle(make_request("healthy", 4, 9, eos_token_ids=frozenset()))[0]


def test_times_add_up() -> None:
    walk = Walk(config())
    walk.now = 5.0
    walk.add(make_request("timed", 20, 3, arrival=2.0, eos_token_ids=frozenset()))
    events = []
    while walk.has_work:
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
