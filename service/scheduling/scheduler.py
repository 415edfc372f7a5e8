"""Continuous batching: which sequences run in the next step, and what a step's result means for them.

`schedule() -> StepPlan` decides, the engine executes, `update(plan, result) -> events` records. The scheduler knows
token ids, positions and slots; it does not know tensors, threads, text or clients, and its only clock is the `now` it
is handed. Decode comes first, then one chunk of one prompt a step, so that a long prompt cannot stop running streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from service.scheduling.plan import (
    Chunk,
    Event,
    FailureEvent,
    Move,
    Row,
    Sample,
    StepPlan,
    StepResult,
    TokenEvent,
)
from service.scheduling.request import Finish, FinishReason, Request, Token
from service.scheduling.slots import SlotLedger, rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one bundle's scheduler, in tokens unless said otherwise.

    Args:
        num_slots: sequences that can run at once.
        capacity: positions one slot can hold.
        kv_budget: positions that all slots together may commit.
        chunk_tokens: longest prefill chunk while other sequences decode.
        idle_chunk_tokens: longest prefill chunk while nothing decodes.
    """

    num_slots: int
    capacity: int
    kv_budget: int
    chunk_tokens: int = 256
    idle_chunk_tokens: int = 512

    def __post_init__(self) -> None:
        for name, least in (("num_slots", 1), ("capacity", 2), ("chunk_tokens", 4), ("idle_chunk_tokens", 4)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}, must be at least {least}")
        if self.kv_budget < rounded(self.capacity):
            raise ValueError(
                f"kv_budget is {self.kv_budget}, must hold one sequence of {rounded(self.capacity)} tokens"
            )


class Phase(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(slots=True)
class _Sequence:
    request: Request
    phase: Phase = Phase.WAITING
    slot: int = -1
    # States are written for positions [0, num_computed).
    num_computed: int = 0
    output: list[int] = field(default_factory=list)
    admitted_at: float = 0.0
    prefill_started_at: float | None = None
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    @property
    def urgency(self) -> tuple[int, float]:
        return (-self.request.priority, self.request.arrival)


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence as a snapshot shows it."""

    request_id: str
    phase: Phase
    slot: int
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
        self._ledger = SlotLedger(config.num_slots, config.kv_budget)

    # What comes in

    def add(self, request: Request) -> None:
        """Queue a request that `fits`."""
        assert request.request_id not in self._sequences, f"request {request.request_id} is already here"
        assert self.fits(request), f"request {request.request_id} can never run"
        self._sequences[request.request_id] = _Sequence(request)

    def fits(self, request: Request) -> bool:
        """Whether the request could run if it were alone."""
        return len(request.prompt) > 0 and request.max_total_tokens <= self.config.capacity

    def cancel(self, request_id: str) -> bool:
        """Forget a request and free its slot; False if it is not here (any more)."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        self._free_slot(sequence)
        return True

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._sequences)

    # What to do

    def schedule(self, now: float) -> StepPlan:
        """Decide the next step. Admission, moves and releases take effect at once, tokens with `update`."""
        releases = self._admit(now)
        moves: list[Move] = []
        while (hole := self._hole()) is not None and (released := self._fill(hole, moves)) is not None:
            releases += released
        chunk = self._next_chunk(now)
        return StepPlan(tuple(releases), tuple(moves), self._decode_rows(), chunk)

    def release_idle(self) -> StepPlan:
        """Plan to give back the memory of all free slots."""
        return StepPlan(releases=self._ledger.release_idle())

    def _admit(self, now: float) -> list[int]:
        releases: list[int] = []
        for sequence in sorted(self._in(Phase.WAITING), key=lambda waiting: waiting.urgency):
            placed = self._ledger.acquire(sequence.request.max_total_tokens)
            if placed is None:
                break  # in order: a small request does not starve a large one
            sequence.slot, released = placed
            sequence.phase = Phase.PREFILL
            sequence.admitted_at = now
            releases += released
        return releases

    def _hole(self) -> int | None:
        """Return the lowest free slot below a decode row: as a parked row it would cost every step."""
        highest = max((sequence.slot for sequence in self._in(Phase.DECODE)), default=-1)
        hole = min(self._ledger.free, default=highest)
        return hole if hole < highest else None

    def _fill(self, hole: int, moves: list[Move]) -> tuple[int, ...] | None:
        """Move the highest decode row into the hole, if memory holds both copies for a moment."""
        highest = max(self._in(Phase.DECODE), key=lambda sequence: sequence.slot)
        released = self._ledger.move(highest.slot, hole)
        if released is not None:
            moves.append(Move(highest.slot, hole, highest.num_computed))
            highest.slot = hole
        return released

    def _decode_rows(self) -> tuple[Row, ...]:
        by_slot = {s.slot: s for s in self._sequences.values() if s.phase is not Phase.WAITING}
        decoding = [slot for slot, sequence in by_slot.items() if sequence.phase is Phase.DECODE]
        if not decoding:
            return ()
        return tuple(self._row(by_slot.get(slot)) for slot in range(max(decoding) + 1))

    @staticmethod
    def _row(sequence: _Sequence | None) -> Row:
        if sequence is None:
            return Row(token_id=0, length=1, sample=None)
        length = sequence.num_computed + 1
        if sequence.phase is Phase.PREFILL:
            return Row(token_id=0, length=length, sample=None)
        return Row(token_id=sequence.output[-1], length=length, sample=_sample(sequence))

    def _next_chunk(self, now: float) -> Chunk | None:
        prefilling = self._in(Phase.PREFILL)
        if not prefilling:
            return None
        sequence = min(prefilling, key=lambda candidate: candidate.urgency)
        if sequence.prefill_started_at is None:
            sequence.prefill_started_at = now
        prompt = sequence.request.prompt
        start = sequence.num_computed
        limit = self.config.chunk_tokens if self._in(Phase.DECODE) else self.config.idle_chunk_tokens
        end = start + chunk_length(len(prompt) - start, limit)
        sample = _sample(sequence) if end == len(prompt) else None
        return Chunk(sequence.request.request_id, sequence.slot, start, prompt[start:end], sample)

    # What came of it

    def update(self, plan: StepPlan, result: StepResult, now: float) -> list[Event]:
        """Record a step. Requests that were cancelled while it ran are passed over."""
        events: list[Event] = []
        for sample in [row.sample for row in plan.rows]:
            sequence = self._sequences.get(sample.request.request_id) if sample else None
            if sequence is not None:
                sequence.num_computed += 1
                self._settle(sequence, result, now, events)
        chunk = plan.chunk
        if chunk is not None and (sequence := self._sequences.get(chunk.request_id)) is not None:
            sequence.num_computed = chunk.start + len(chunk.token_ids)
            if chunk.sample is not None or chunk.request_id in result.failures:
                self._settle(sequence, result, now, events)
        return events

    def _settle(self, sequence: _Sequence, result: StepResult, now: float, events: list[Event]) -> None:
        request = sequence.request
        if (message := result.failures.get(request.request_id)) is not None:
            self.cancel(request.request_id)
            events.append(FailureEvent(request, message))
            return
        token = result.tokens[request.request_id]
        is_first = not sequence.output
        sequence.output.append(token.token_id)
        gap = now - (request.arrival if is_first else sequence.last_token_at)
        sequence.last_token_at = now
        if is_first:
            sequence.phase = Phase.DECODE
            sequence.first_token_at = now
        finish = self._finish(sequence, token)
        assert sequence.prefill_started_at is not None
        events.append(
            TokenEvent(
                request=request,
                token=token,
                context_tokens=sequence.num_computed,
                is_first=is_first,
                gap_seconds=gap,
                queue_seconds=sequence.prefill_started_at - request.arrival,
                prefill_seconds=sequence.first_token_at - sequence.prefill_started_at,
                finish=finish,
            )
        )
        if finish is not None:
            self.cancel(request.request_id)

    @staticmethod
    def _finish(sequence: _Sequence, token: Token) -> Finish | None:
        request = sequence.request
        if token.token_id in request.stop_token_ids:
            reason = FinishReason.STOP
        elif token.token_id in request.eos_token_ids:
            reason = FinishReason.EOS
        elif len(sequence.output) >= request.max_tokens:
            reason = FinishReason.LENGTH
        else:
            return None
        assert sequence.prefill_started_at is not None
        return Finish(
            reason=reason,
            queue_seconds=sequence.prefill_started_at - request.arrival,
            prefill_seconds=sequence.first_token_at - sequence.prefill_started_at,
            decode_seconds=sequence.last_token_at - sequence.first_token_at,
        )

    def _free_slot(self, sequence: _Sequence) -> None:
        if sequence.phase is not Phase.WAITING:
            # A parked row may have written one position past what was computed.
            written = min(sequence.num_computed + 1, self.config.capacity)
            self._ledger.give_back(sequence.slot, written)

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


def _sample(sequence: _Sequence) -> Sample:
    request = sequence.request
    output = tuple(sequence.output) if request.sampling.adjusts_logits else ()
    return Sample(request, len(request.prompt) + len(sequence.output), len(sequence.output), output)


def _view(sequence: _Sequence) -> SequenceView:
    return SequenceView(
        request_id=sequence.request.request_id,
        phase=sequence.phase,
        slot=sequence.slot,
        num_prompt=len(sequence.request.prompt),
        num_computed=sequence.num_computed,
        num_output=len(sequence.output),
        max_total_tokens=sequence.request.max_total_tokens,
    )
