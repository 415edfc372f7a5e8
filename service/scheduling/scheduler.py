"""Continuous batching: which sequences run in the next step, and what a step's result means for them.

`schedule() -> StepPlan` decides, the engine executes, `update(plan, result) -> events` records. The scheduler knows
token ids, positions and slots; it does not know tensors, threads, text or clients, and its only clock is the `now` it
is handed. Decode comes first, then a limited number of prompt tokens a step, so that a long prompt cannot stop running
streams.

A sequence has a branch for each of its beams, and every branch a slot; without a beam search it has one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from service.scheduling.beam import BeamSearch, Continuation
from service.scheduling.plan import (
    Chunk,
    Encode,
    Event,
    ExpiryEvent,
    FailureEvent,
    Move,
    Release,
    Row,
    Sample,
    SearchEvent,
    StepPlan,
    StepResult,
    TokenEvent,
)
from service.scheduling.prefixes import NOTHING, Prefix, Prefixes
from service.scheduling.request import Finish, FinishReason, Hypothesis, Request, Token
from service.scheduling.slots import SlotLedger, rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one bundle's scheduler, in tokens unless said otherwise.

    Args:
        num_slots: sequences that can run at once.
        capacity: positions one slot can hold.
        kv_budget: positions that all slots together may commit.
        chunk_tokens: prompt and source tokens of a step while other sequences decode.
        idle_chunk_tokens: prompt and source tokens of a step while nothing decodes.
        prefill_chunk: where every prompt is cut, or None where cuts do not matter; at 1 there is no prefill, and
            prompts go among the decode rows.
        window: positions behind the last one that stay in memory, or None where all do.
        reuses_prefixes: whether a prompt may begin with what another left in a slot: where states are nothing but
            what lies at each position.
    """

    num_slots: int
    capacity: int
    kv_budget: int
    chunk_tokens: int = 256
    idle_chunk_tokens: int = 512
    prefill_chunk: int | None = None
    window: int | None = None
    reuses_prefixes: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_slots", 1), ("capacity", 2), ("chunk_tokens", 4), ("idle_chunk_tokens", 4)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}, must be at least {least}")
        for name in ("prefill_chunk", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        if self.kv_budget < rounded(self.held(self.capacity)):
            raise ValueError(
                f"kv_budget is {self.kv_budget}, must hold one sequence of {rounded(self.held(self.capacity))} tokens"
            )

    def held(self, positions: int) -> int:
        """Return how many of a sequence's positions are in memory at most: the window and a step's new ones."""
        if self.window is None:
            return positions
        return min(positions, self.window + max(self.idle_chunk_tokens, self.chunk_tokens, self.prefill_chunk or 0))


class Phase(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(slots=True)
class _Branch:
    slot: int
    output: list[int] = field(default_factory=list)
    log_likelihood: float = 0.0  # kept by a beam search only


@dataclass(slots=True)
class _Sequence:
    request: Request
    phase: Phase = Phase.WAITING
    branches: list[_Branch] = field(default_factory=list)
    spare_slots: list[int] = field(default_factory=list)  # held for beams that are not there yet
    copies: list[Move] = field(default_factory=list)  # from beams that go on twice, due before the next step
    search: BeamSearch | None = None
    # States are written for positions [0, num_computed), of every branch.
    num_computed: int = 0
    num_cached: int = 0  # of those, the ones that were copied
    admitted_at: float = 0.0
    prefill_started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float = 0.0

    @property
    def urgency(self) -> tuple[int, float, float]:
        return (-self.request.priority, self.request.due, self.request.arrival)

    @property
    def slots(self) -> tuple[int, ...]:
        return (*(branch.slot for branch in self.branches), *self.spare_slots)

    @property
    def num_output(self) -> int:
        return len(self.branches[0].output) if self.branches else 0

    @property
    def reads_its_last(self) -> bool:
        """Whether the next token to be fed is the last there is, so that a new one follows from it."""
        return self.num_computed + 1 == len(self.request.prompt) + self.num_output


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence as a snapshot shows it."""

    request_id: str
    phase: Phase
    slots: tuple[int, ...]
    num_slots: int
    num_prompt: int
    num_computed: int
    num_output: int
    max_total_tokens: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The scheduler's whole state as a value, for metrics and for `invariants.violations`."""

    config: SchedulerConfig
    sequences: tuple[SequenceView, ...]
    free_slots: frozenset[int]
    reserved: int
    committed: int

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return sum(view.phase is Phase.WAITING for view in self.sequences)

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return len(self.sequences) - self.num_waiting


MIN_CHUNK = 2
"""Tokens of a prompt's shortest chunk, but for prompts of one token."""

QUERY_TILE = 16
"""Attention takes a chunk's queries in tiles of a multiple of this many."""


def chunk_length(remaining: int, limit: int) -> int:
    """Return how many of `remaining` prompt tokens to prefill now, at most `limit` (at least 4).

    No chunk leaves a tile of a single query, nor a single token for the next chunk: one query takes another kernel,
    whose sums round differently, and a result must not depend on how a prompt was cut. A prompt of one token has no
    choice, and is always computed so.
    """
    if remaining == 1:
        return 1
    length = min(remaining, limit)
    while length % QUERY_TILE == 1 or remaining - length == 1:
        length -= 1
    return length


class Scheduler:
    """Continuous batching over a fixed number of slots and a budget of KV memory."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._sequences: dict[str, _Sequence] = {}
        self._ledger = SlotLedger(config.num_slots, config.kv_budget, reuses_pages=config.window is None)
        self._prefixes = Prefixes(config.num_slots)

    # What comes in

    def add(self, request: Request) -> None:
        """Queue a request that `fits`."""
        assert request.request_id not in self._sequences, f"request {request.request_id} is already here"
        assert self.fits(request), f"request {request.request_id} can never run"
        search = None if request.beam is None else BeamSearch(request)
        self._sequences[request.request_id] = _Sequence(request, search=search)

    def fits(self, request: Request) -> bool:
        """Whether the request could run if it were alone."""
        memory = request.num_slots * rounded(self.config.held(request.max_total_tokens))
        return (
            len(request.prompt) > 0
            and request.max_total_tokens <= self.config.capacity
            and request.num_slots <= self.config.num_slots
            and memory <= self.config.kv_budget
        )

    def cancel(self, request_id: str) -> bool:
        """Forget a request and free its slots; False if it is not here (any more)."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        # A parked row may have written one position past what was computed.
        written = self.config.held(min(sequence.num_computed + 1, self.config.capacity))
        for slot in sequence.slots:
            self._ledger.give_back(slot, written)
        return True

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._sequences)

    # What to do

    def expire(self, now: float) -> list[Event]:
        """Forget requests whose deadline has passed, before they cost another step."""
        expired = [s for s in self._sequences.values() if s.request.deadline is not None and s.request.deadline <= now]
        events: list[Event] = []
        for sequence in expired:
            self.cancel(sequence.request.request_id)
            events.append(ExpiryEvent(sequence.request, sequence.phase.value, sequence.num_output))
        return events

    def schedule(self, now: float) -> StepPlan:
        """Decide the next step. Admission, moves and releases take effect at once, tokens with `update`."""
        # What is decided later reads memory as it is left by what was decided before.
        memory = self._beam_copies()
        self._admit(now, memory)
        while (hole := self._hole()) is not None and self._fill(hole, memory):
            pass
        limit = self.config.chunk_tokens if self._in(Phase.DECODE) else self.config.idle_chunk_tokens
        encodes = self._next_encodes(limit, now)
        chunks = self._next_chunks(
            limit, now, memory
        )  # before the rows: a parked one is written behind what was copied
        first_slot, rows = self._decode_rows(now)
        return StepPlan(
            memory=tuple(memory),
            encodes=encodes,
            first_slot=first_slot,
            rows=rows,
            chunks=chunks,
        )

    def release_idle(self) -> StepPlan:
        """Plan to give back the memory of all free slots."""
        memory: list[Release | Move] = []
        self._release(self._ledger.release_idle(), memory)
        return StepPlan(memory=tuple(memory))

    def _release(self, slots: Iterable[int], memory: list[Release | Move]) -> None:
        for slot in slots:
            self._prefixes.put(slot, NOTHING)
            memory.append(Release(slot))

    def _forget(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._prefixes.put(slot, NOTHING)

    def _admit(self, now: float, memory: list[Release | Move]) -> None:
        for sequence in sorted(self._in(Phase.WAITING), key=lambda waiting: waiting.urgency):
            request = sequence.request
            found = self._prefixes.longest(request.prompt) if self._reuses_prefix(request) else None
            if found is not None:
                self._ledger.touch(found[0])
            preferred = self._preferred(found)
            placed = self._ledger.acquire(
                self.config.held(request.max_total_tokens),
                request.num_slots,
                preferred,
                begun=found is not None and found[0] == preferred,
            )
            if placed is None:
                break  # in order: a small request does not starve a large one
            (first, *spare), released = placed
            self._release(released, memory)
            self._forget(spare)
            sequence.branches, sequence.spare_slots = [_Branch(first)], spare
            self._begin(sequence, found, memory)
            sequence.phase = self._first_phase(request) if request.source is None else Phase.ENCODE
            sequence.admitted_at = now

    def _reuses_prefix(self, request: Request) -> bool:
        return self.config.reuses_prefixes and request.source is None

    def _preferred(self, found: tuple[int, int] | None) -> int | None:
        """Return the free slot to begin in, or None to take the lowest.

        That is the one of the prefix if nearly all that it holds goes on; otherwise any other, so that it stays for
        others. In an idle server it is the one that was of use longest ago.
        """
        free = self._ledger.free
        if found is not None and found[0] in free:
            slot, length = found
            if length + 2 >= self._prefixes[slot].length or len(free) == 1:
                return slot
            free -= {slot}
        if self.config.reuses_prefixes and len(self._ledger.free) == self.config.num_slots:
            return next(slot for slot in self._ledger.by_use() if slot in free)
        return min(free, default=None)

    def _begin(self, sequence: _Sequence, found: tuple[int, int] | None, memory: list[Release | Move]) -> None:
        """Begin a prompt with what is there of it, in its own slot or in another."""
        slot, prompt = sequence.branches[0].slot, sequence.request.prompt
        sequence.num_computed = sequence.num_cached = 0
        self._prefixes.put(slot, self._prefixes[slot] if found is not None and found[0] == slot else NOTHING)
        if found is None or not self._prefixes[found[0]].length:  # its pages may have been given back just now
            return
        source, length = found
        sequence.num_computed = sequence.num_cached = length
        self._prefixes.put(slot, Prefix(prompt, length))
        if source != slot:
            memory.append(Move(source, slot, length))

    def _catch_up(self, sequence: _Sequence, memory: list[Release | Move]) -> None:
        """Look again for a beginning, before a prompt's first chunk: others were computed since it was admitted."""
        request, slot = sequence.request, sequence.branches[0].slot
        if sequence.num_computed > sequence.num_cached or not self._reuses_prefix(request):
            return
        found = self._prefixes.longest(request.prompt)
        if found is not None and found[1] > sequence.num_computed:
            source, sequence.num_computed = found
            sequence.num_cached = sequence.num_computed
            self._prefixes.put(slot, Prefix(request.prompt, sequence.num_computed))
            self._ledger.touch(source)
            memory.append(Move(source, slot, sequence.num_computed))

    def _first_phase(self, request: Request) -> Phase:
        """Return how the prompt is read: in chunks, or as decode rows if it has one token or all go so."""
        return Phase.DECODE if len(request.prompt) == 1 or self.config.prefill_chunk == 1 else Phase.PREFILL

    def _beam_copies(self) -> list[Release | Move]:
        copies: list[Release | Move] = []
        for sequence in self._sequences.values():
            copies += sequence.copies
            sequence.copies = []
        return copies

    def _decoding(self) -> Iterator[tuple[_Sequence, _Branch]]:
        for sequence in self._in(Phase.DECODE):
            for branch in sequence.branches:
                yield sequence, branch

    def _hole(self) -> int | None:
        """Return the lowest free slot between decode rows: as a parked row it would cost every step."""
        slots = [branch.slot for _, branch in self._decoding()]
        if not slots:
            return None
        return min((slot for slot in self._ledger.free if min(slots) < slot < max(slots)), default=None)

    def _fill(self, hole: int, memory: list[Release | Move]) -> bool:
        """Move the highest decode row into the hole, if memory holds both copies for a moment."""
        sequence, highest = max(self._decoding(), key=lambda pair: pair[1].slot)
        released = self._ledger.move(highest.slot, hole)
        if released is None:
            return False
        self._release(released, memory)
        self._prefixes.put(hole, self._prefixes[highest.slot])
        memory.append(Move(highest.slot, hole, sequence.num_computed))
        highest.slot = hole
        return True

    def _next_encodes(self, limit: int, now: float) -> tuple[Encode, ...]:
        """Take sources of as many tokens as the limit allows, and at least one."""
        encodes: list[Encode] = []
        num_tokens = 0
        for sequence in sorted(self._in(Phase.ENCODE), key=lambda waiting: waiting.urgency):
            request = sequence.request
            assert request.source is not None
            num_tokens += max(1, len(request.source.token_ids))
            if encodes and num_tokens > limit:
                break
            sequence.prefill_started_at = now
            encodes.append(Encode(request.request_id, sequence.branches[0].slot, request.source))
        return tuple(encodes)

    def _decode_rows(self, now: float) -> tuple[int, tuple[Row, ...]]:
        """Return the first slot and the rows of all slots from the lowest to the highest that decodes."""
        decoding = {branch.slot: (sequence, branch) for sequence, branch in self._decoding()}
        if not decoding:
            return 0, ()
        lengths = {s.branches[0].slot: s.num_computed + 1 for s in self._in(Phase.PREFILL)}
        rows = tuple(
            self._row(*decoding[slot], now) if slot in decoding else self._parked(slot, lengths.get(slot))
            for slot in range(min(decoding), max(decoding) + 1)
        )
        return min(decoding), rows

    def _parked(self, slot: int, length: int | None) -> Row:
        """Return a row that writes into a prompt's next position, or, in a free slot, behind what it still holds."""
        if length is None:
            length = self._prefixes[slot].length + 1
        if length > self.config.capacity:
            self._forget([slot])
            length = 1
        return Row(request_id=None, token_id=0, length=length, sample=None)

    @staticmethod
    def _row(sequence: _Sequence, branch: _Branch, now: float) -> Row:
        request, position = sequence.request, sequence.num_computed
        if sequence.prefill_started_at is None:
            sequence.prefill_started_at = now
        num_prompt = len(request.prompt)
        token_id = request.prompt[position] if position < num_prompt else branch.output[position - num_prompt]
        sample = _sample(request, branch) if sequence.reads_its_last else None
        return Row(request.request_id, token_id, position + 1, sample)

    def _next_chunks(self, limit: int, now: float, memory: list[Release | Move]) -> tuple[Chunk, ...]:
        """Take the most urgent prompt as far as the limit allows, then others that end within what is left of it."""
        chunks: list[Chunk] = []
        left = limit
        for sequence in sorted(self._in(Phase.PREFILL), key=lambda waiting: waiting.urgency):
            if chunks and left < MIN_CHUNK:
                break
            self._catch_up(sequence, memory)
            request, start = sequence.request, sequence.num_computed
            remaining = len(request.prompt) - start
            if self.config.prefill_chunk is not None:
                length = min(remaining, self.config.prefill_chunk)
            else:
                length = chunk_length(remaining, limit)
            if chunks and (length > left or length < remaining):
                break
            left -= length
            if sequence.prefill_started_at is None:
                sequence.prefill_started_at = now
            end = start + length
            branch = sequence.branches[0]
            sample = _sample(request, branch) if length == remaining else None
            chunks.append(Chunk(request.request_id, branch.slot, start, request.prompt[start:end], sample))
        return tuple(chunks)

    # What came of it

    def update(self, plan: StepPlan, result: StepResult, now: float) -> list[Event]:
        """Record a step. Requests that were cancelled while it ran are passed over."""
        events: list[Event] = []
        for encode in plan.encodes:
            sequence = self._sequences.get(encode.request_id)
            if sequence is not None and not self._failed(sequence, result, events):
                sequence.phase = self._first_phase(sequence.request)
        fed = {row.request_id: 1 for row in plan.rows if row.request_id is not None}
        for request_id, num_tokens in [*fed.items(), *((c.request_id, len(c.token_ids)) for c in plan.chunks)]:
            sequence = self._sequences.get(request_id)
            if sequence is None or self._failed(sequence, result, events):
                continue
            reads_its_last = sequence.num_computed + num_tokens == len(sequence.request.prompt) + sequence.num_output
            sequence.num_computed += num_tokens
            if self._reuses_prefix(sequence.request) and request_id not in fed:
                slot = sequence.branches[0].slot
                self._prefixes.put(slot, Prefix(sequence.request.prompt, sequence.num_computed))
            if reads_its_last:
                self._continue(sequence, [result.tokens[branch.slot] for branch in sequence.branches], now, events)
        return events

    def _failed(self, sequence: _Sequence, result: StepResult, events: list[Event]) -> bool:
        message = result.failures.get(sequence.request.request_id)
        if message is None:
            return False
        self._forget(sequence.slots)  # whatever is wrong with it, nobody else begins with it
        self.cancel(sequence.request.request_id)
        events.append(FailureEvent(sequence.request, message))
        return True

    def _continue(self, sequence: _Sequence, tokens: Sequence[Token], now: float, events: list[Event]) -> None:
        """Give each branch its next token, and end the request if that was the last."""
        is_first = sequence.first_token_at is None
        gap = now - (sequence.request.arrival if is_first else sequence.last_token_at)
        sequence.phase = Phase.DECODE
        sequence.last_token_at = now
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        event: SearchEvent | TokenEvent | None
        if sequence.search is not None:
            event = self._search(sequence, sequence.search, tokens)
        else:
            event = self._append(sequence, tokens[0], gap, is_first)
        if event is None:
            return
        events.append(event)
        if event.finish is not None:
            self.cancel(sequence.request.request_id)

    def _append(self, sequence: _Sequence, token: Token, gap_seconds: float, is_first: bool) -> TokenEvent:
        (branch,), request = sequence.branches, sequence.request
        branch.output.append(token.token_id)
        reason = None
        if token.token_id in request.stop_token_ids:
            reason = FinishReason.STOP
        elif token.token_id in request.eos_token_ids:
            reason = FinishReason.EOS
        elif len(branch.output) >= request.max_tokens:
            reason = FinishReason.LENGTH
        queue_seconds, prefill_seconds = _times(sequence)
        return TokenEvent(
            request=request,
            token=token,
            context_tokens=sequence.num_computed,
            is_first=is_first,
            gap_seconds=gap_seconds,
            queue_seconds=queue_seconds,
            prefill_seconds=prefill_seconds,
            cached_tokens=sequence.num_cached,
            finish=None if reason is None else _finish(sequence, reason),
        )

    def _search(self, sequence: _Sequence, search: BeamSearch, tokens: Sequence[Token]) -> SearchEvent | None:
        branches = sequence.branches
        going = search.advance([b.output for b in branches], [b.log_likelihood for b in branches], tokens)
        if going:
            self._branch(sequence, going)
            return None
        queue_seconds, prefill_seconds = _times(sequence)
        return SearchEvent(
            request=sequence.request,
            finish=_finish(sequence, search.best[0].reason, search.best),
            queue_seconds=queue_seconds,
            prefill_seconds=prefill_seconds,
            cached_tokens=sequence.num_cached,
        )

    def _branch(self, sequence: _Sequence, going: Sequence[Continuation]) -> None:
        """Let beams go on: a beam's first continuation keeps its slot, others get copies in slots of beams that end.

        No copy reads a slot that another one writes, so their order does not matter.
        """
        old = sequence.branches
        parents = {continuation.parent for continuation in going}
        free = [*sequence.spare_slots, *(branch.slot for i, branch in enumerate(old) if i not in parents)]
        new = []
        for continuation in going:
            parent = old[continuation.parent]
            slot = parent.slot
            if continuation.parent in parents:
                parents.remove(continuation.parent)
            else:
                slot = free.pop(0)
                self._prefixes.put(slot, self._prefixes[parent.slot])
                sequence.copies.append(Move(parent.slot, slot, sequence.num_computed))
            new.append(_Branch(slot, [*parent.output, continuation.token_id], continuation.log_likelihood))
        sequence.branches, sequence.spare_slots = new, free

    # What it looks like

    def snapshot(self) -> Snapshot:
        """Return the whole state as a value."""
        return Snapshot(
            config=self.config,
            sequences=tuple(_view(sequence) for sequence in self._sequences.values()),
            free_slots=self._ledger.free,
            reserved=self._ledger.reserved,
            committed=self._ledger.committed,
        )

    def _in(self, phase: Phase) -> Sequence[_Sequence]:
        return [sequence for sequence in self._sequences.values() if sequence.phase is phase]


def _sample(request: Request, branch: _Branch) -> Sample:
    output = tuple(branch.output) if request.sampling.adjusts_logits else ()
    return Sample(request, len(request.prompt) + len(branch.output), len(branch.output), output)


def _times(sequence: _Sequence) -> tuple[float, float]:
    """Return the seconds in the queue and in prefill of a sequence that has its first token."""
    assert sequence.prefill_started_at is not None and sequence.first_token_at is not None
    queue_seconds = sequence.prefill_started_at - sequence.request.arrival
    return queue_seconds, sequence.first_token_at - sequence.prefill_started_at


def _finish(sequence: _Sequence, reason: FinishReason, hypotheses: tuple[Hypothesis, ...] = ()) -> Finish:
    queue_seconds, prefill_seconds = _times(sequence)
    assert sequence.first_token_at is not None
    return Finish(
        reason=reason,
        queue_seconds=queue_seconds,
        prefill_seconds=prefill_seconds,
        decode_seconds=sequence.last_token_at - sequence.first_token_at,
        cached_tokens=sequence.num_cached,
        hypotheses=hypotheses,
    )


def _view(sequence: _Sequence) -> SequenceView:
    return SequenceView(
        request_id=sequence.request.request_id,
        phase=sequence.phase,
        slots=sequence.slots,
        num_slots=sequence.request.num_slots,
        num_prompt=len(sequence.request.prompt),
        num_computed=sequence.num_computed,
        num_output=sequence.num_output,
        max_total_tokens=sequence.request.max_total_tokens,
    )
