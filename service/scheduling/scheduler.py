"""Continuous batching: which sequences run in the next step, and what a step's result means for them.

`schedule() -> StepPlan` decides, the engine executes, `update(plan, result) -> events` records. The scheduler knows
token ids, positions and slots; it does not know tensors, threads, text or clients, and its only clock is the `now` it
is handed. Decode comes first, then a limited number of prompt tokens a step, so that a long prompt cannot stop running
streams.

Who goes first: the tenant who has had less of the engine's time; of one tenant the higher priority, which grows while a
request waits; of one priority the earliest deadline. A scheduler that can foresee what work costs turns away what
cannot be finished in time, and lets nobody join who would make others late.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from math import inf

from service.scheduling.beam import BeamSearch, Continuation
from service.scheduling.canary import is_replay
from service.scheduling.config import SchedulerConfig
from service.scheduling.forecast import CHUNK_UNIT, LENT, Due, Forecast, Load
from service.scheduling.joining import best_group
from service.scheduling.plan import (
    Chunk,
    Encode,
    Event,
    ExpiryEvent,
    FailureEvent,
    Move,
    RefusalEvent,
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
from service.scheduling.row_buckets import bucket_of
from service.scheduling.sequence import Branch, LiveSequence, Occupancy, Phase, Snapshot, view_of
from service.scheduling.shares import Shares
from service.scheduling.slots import SlotLedger, rounded
from service.scheduling.work import Predict

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
    """Continuous batching over a fixed number of slots and a budget of KV memory.

    Args:
        config: its limits.
        predict: foresees the seconds of a run; without it nobody is turned away, and chunks have a fixed size.
    """

    def __init__(self, config: SchedulerConfig, predict: Predict | None = None) -> None:
        self.config = config
        self._predict = predict
        self._forecast = Forecast(predict or (lambda phase, work: None), config)
        self._shares = Shares()
        self._sequences: dict[str, LiveSequence] = {}
        self._ledger = SlotLedger(config.num_slots, config.kv_budget, reuses_pages=config.window is None)
        self._prefixes = Prefixes(config.num_slots)
        self._under_way: StepPlan | None = None  # whose certain part is recorded

    # What comes in

    def add(self, request: Request) -> None:
        """Queue a request that `fits`."""
        assert request.request_id not in self._sequences, f"request {request.request_id} is already here"
        assert self.fits(request), f"request {request.request_id} can never run"
        search = None if request.beam is None else BeamSearch(request)
        tenant = self._shares.enter(request.tenant)
        self._sequences[request.request_id] = LiveSequence(request, search=search, tenant=tenant)

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
        self._shares.leave(sequence.tenant)
        self._forget(copy.destination for copy in sequence.copies)  # which are not made any more
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
        """Forget requests whose deadline has passed, or will have, before they cost another step."""
        events: list[Event] = []
        for sequence in [s for s in self._sequences.values() if _slack(s.request, now) <= 0]:
            self.cancel(sequence.request.request_id)
            num_tokens = sequence.num_output - sequence.awaits_token
            events.append(ExpiryEvent(sequence.request, sequence.phase.value, num_tokens))
        if self._predict is not None:
            events += self._refuse(now)
        return events

    def _refuse(self, now: float) -> list[Event]:
        """Turn away who comes and would be late behind those before it, or who waits and would be late even at once.

        Not before it is known how long answers are: then all are taken to be as long as they may be.
        """
        events: list[Event] = []
        if not any(s.load is None or s.request.deadline is not None for s in self._in(Phase.WAITING)):
            return events
        ahead: list[Load] = []
        running = self._running(now)
        for sequence in self._by_urgency(Phase.WAITING, now):
            due, is_new = self._foresee(sequence, now)
            if due is None:
                continue
            # Alone, what is foreseen is put to the test.
            if due.slack < inf and len(self._sequences) > 1 and self._forecast.lengths.is_known:
                seconds = self._forecast.finish(due, running, ahead) if is_new else self._forecast.alone(due.load)
                if seconds is not None and seconds > due.slack:
                    self.cancel(sequence.request.request_id)
                    events.append(self._refusal(sequence.request, now, seconds))
                    continue
            ahead.append(due.load)
        return events

    def _foresee(self, sequence: LiveSequence, now: float) -> tuple[Due | None, bool]:
        """Return what is to be done for a waiting request, if that is known, and whether it is known only now."""
        request, is_new = sequence.request, sequence.load is None
        if is_new:
            found = self._prefixes.longest(request.prompt) if self._reuses_prefix(request) else None
            sequence.load = self._forecast.load(request, 0 if found is None else found[1])
        return None if sequence.load is None else Due(sequence.load, _slack(request, now)), is_new

    def _refusal(self, request: Request, now: float, seconds: float) -> RefusalEvent:
        num_waiting = len(self._in(Phase.WAITING))
        return RefusalEvent(
            request=request,
            predicted_seconds=now - request.arrival + seconds,
            num_waiting=num_waiting,
            num_running=len(self._sequences) - num_waiting,
        )

    def queue_seconds(self, now: float) -> float:
        """Return how long one more request like those that wait would wait, as foreseen; 0 if that is not known."""
        waiting = self._in(Phase.WAITING)
        ahead = [sequence.load for sequence in waiting if sequence.load is not None]
        if not ahead:
            return 0.0
        return self._forecast.wait([due.load for due in self._running(now)], ahead)

    @property
    def _has_deadlines(self) -> bool:
        """Whether anybody can be late: if not, nothing need be foreseen of the others."""
        return any(sequence.request.deadline is not None for sequence in self._sequences.values())

    def _running(self, now: float) -> list[Due]:
        """Return what those that have slots still have to do, as far as it can be foreseen."""
        found = []
        for sequence in self._sequences.values():
            if sequence.phase is Phase.WAITING:
                continue
            load = self._forecast.load(
                sequence.request,
                sequence.num_computed,
                sequence.num_output,
                encoded=sequence.phase is not Phase.ENCODE,
            )
            if load is not None:
                found.append(Due(load, _slack(sequence.request, now)))
        return found

    def _by_urgency(self, phase: Phase, now: float) -> list[LiveSequence]:
        """Return the sequences of a phase in the order in which they are to go on."""
        ranks = self._shares.ranks()

        def key(sequence: LiveSequence) -> tuple[int, int, float, float]:
            request = sequence.request
            aged = int((now - request.arrival) / self.config.ageing)
            return ranks[sequence.tenant], -(request.priority + aged), request.due, request.arrival

        return sorted(self._in(phase), key=key)

    def schedule(self, now: float) -> StepPlan:
        """Decide the next step. Admission, moves and releases take effect at once, tokens with `update`."""
        # What is decided later reads memory as it is left by what was decided before.
        memory = self._beam_copies()
        self._admit(now, memory)
        while (hole := self._hole()) is not None and self._fill(hole, memory):
            pass
        limit = self._chunk_limit(now)
        encodes = self._next_encodes(limit, now)
        # Chunks before the rows: a parked one is written behind what was copied.
        prompts, chunks = self._joined(self._next_chunks(limit, now, memory))
        first_slot, rows = self._decode_rows(now)
        return StepPlan(
            memory=tuple(memory),
            encodes=encodes,
            first_slot=first_slot,
            rows=rows,
            prompts=prompts,
            chunks=chunks,
        )

    def _chunk_limit(self, now: float) -> int:
        """Return how many prompt and source tokens the step may read.

        Beside running streams, as many as keep the inter-token target and leave nobody late who would not be; who has
        waited for long reads whatever it does to the others.
        """
        decoding = [sequence.num_computed + 1 for sequence, _ in self._decoding()]
        if not decoding:
            return self.config.idle_chunk_tokens
        reading = self._by_urgency(Phase.PREFILL, now)
        seconds = self._forecast.decode_seconds(len(decoding), sum(decoding))
        if not self.config.inter_token_target or seconds is None or not reading:
            return self.config.chunk_tokens
        fits = self._forecast.chunk_tokens(
            self.config.inter_token_target - seconds, reading[0].num_computed, self.config.idle_chunk_tokens
        )
        if fits is None:
            return self.config.chunk_tokens
        limit = max(CHUNK_UNIT, fits)
        if not self._has_deadlines:
            return limit
        dues = self._running(now)
        laxities = self._forecast.laxities(dues) or []
        decoders = [spare for due, spare in zip(dues, laxities, strict=False) if not due.load.reading and spare >= 0]
        spare = min(decoders, default=inf)
        if spare == inf or now - reading[0].request.arrival > self.config.ageing:
            return limit
        return self._forecast.chunk_tokens(LENT * spare, reading[0].num_computed, limit) or 0

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
        waiting = self._by_urgency(Phase.WAITING, now) if self._ledger.free else []
        running = self._running(now) if waiting and self._has_deadlines else []
        for sequence in waiting:
            request = sequence.request
            if not self._may_join(sequence, running, now):
                continue
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
            sequence.branches, sequence.spare_slots = [Branch(first)], spare
            self._begin(sequence, found, memory)
            sequence.phase = self._first_phase(request) if request.source is None else Phase.ENCODE
            sequence.admitted_at = now
            if sequence.load is not None:
                running.append(Due(sequence.load, _slack(request, now)))

    def _may_join(self, sequence: LiveSequence, running: list[Due], now: float) -> bool:
        """Return whether a request may run now: it waits a while if it or others would not be in time for it."""
        if not running or sequence.load is None or now - sequence.request.arrival > self.config.ageing:
            return True
        return self._forecast.joins(Due(sequence.load, _slack(sequence.request, now)), running)

    def _reuses_prefix(self, request: Request) -> bool:
        return self.config.reuses_prefixes and request.source is None and request.may_reuse

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

    def _begin(self, sequence: LiveSequence, found: tuple[int, int] | None, memory: list[Release | Move]) -> None:
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

    def _catch_up(self, sequence: LiveSequence, memory: list[Release | Move]) -> None:
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

    def _decoding(self) -> Iterator[tuple[LiveSequence, Branch]]:
        for sequence in self._in(Phase.DECODE):
            if sequence.goes_on:
                for branch in sequence.branches:
                    yield sequence, branch

    def _hole(self) -> int | None:
        """Return the lowest free slot between decode rows, if as a parked row it would cost every step."""
        slots = [branch.slot for _, branch in self._decoding()]
        if not slots:
            return None
        lowest, highest = min(slots), max(slots)
        if buckets := self.config.row_buckets:
            if bucket_of(highest + 1, buckets) == bucket_of(len(slots), buckets):
                return None
            lowest = -1
        return min((slot for slot in self._ledger.free if lowest < slot < highest), default=None)

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
        for sequence in self._by_urgency(Phase.ENCODE, now):
            request = sequence.request
            assert request.source is not None
            num_tokens += max(1, len(request.source.token_ids))
            if encodes and num_tokens > limit:
                break
            sequence.prefill_started_at = now
            encodes.append(Encode(request.request_id, sequence.branches[0].slot, request.source))
        return tuple(encodes)

    def _decode_rows(self, now: float) -> tuple[int, tuple[Row, ...]]:
        """Return the first slot and the rows of all slots from the lowest to the highest that decodes.

        With buckets: from slot 0, as many as the smallest bucket that holds them.
        """
        decoding = {branch.slot: (sequence, branch) for sequence, branch in self._decoding()}
        if not decoding:
            return 0, ()
        first, stop = min(decoding), max(decoding) + 1
        if buckets := self.config.row_buckets:
            first, stop = 0, bucket_of(stop, buckets)
        # Their slots hold more than is known of a free one, where a parked row would write into it.
        held = (s for s in self._sequences.values() if s.phase is Phase.PREFILL or not s.goes_on)
        lengths = {sequence.branches[0].slot: sequence.num_computed + 1 for sequence in held}
        rows = tuple(
            self._row(*decoding[slot], now) if slot in decoding else self._parked(slot, lengths.get(slot))
            for slot in range(first, stop)
        )
        return first, rows

    def _parked(self, slot: int, length: int | None) -> Row:
        """Return a row that writes into a sequence's next position, or, in a free slot, behind what it still holds."""
        if length is None:
            length = self._prefixes[slot].length + 1
        if length > self.config.capacity:
            self._forget([slot])
            length = 1
        return Row.parked(length)

    @staticmethod
    def _row(sequence: LiveSequence, branch: Branch, now: float) -> Row:
        request, position = sequence.request, sequence.num_computed
        if sequence.prefill_started_at is None:
            sequence.prefill_started_at = now
        num_prompt = len(request.prompt)
        sample = _sample(sequence, branch) if sequence.reads_its_last else None
        if position < num_prompt:
            return Row(request.request_id, request.prompt, position, position + 1, sample)
        return Row(request.request_id, branch.output, position - num_prompt, position + 1, sample)

    def _next_chunks(self, limit: int, now: float, memory: list[Release | Move]) -> tuple[Chunk, ...]:
        """Take the most urgent prompt as far as the limit allows, then others that end within what is left of it."""
        chunks: list[Chunk] = []
        left = limit
        for sequence in self._by_urgency(Phase.PREFILL, now):
            if left < MIN_CHUNK:
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
            sample = _sample(sequence, branch) if length == remaining else None
            chunks.append(Chunk(request.request_id, branch.slot, start, request.prompt[start:end], sample))
        return tuple(chunks)

    def _joined(self, chunks: Sequence[Chunk]) -> tuple[tuple[Chunk, ...], tuple[Chunk, ...]]:
        """Return the prompts to be read together, in the order of their slots, and the chunks that are left."""
        if not self.config.joins_prompts or self._predict is None or len(chunks) < 2:
            return (), tuple(chunks)
        prompts = best_group([chunk for chunk in chunks if self._may_be_joined(chunk)], self._predict)
        return prompts, tuple(chunk for chunk in chunks if chunk not in prompts)

    def _may_be_joined(self, chunk: Chunk) -> bool:
        """Return whether it is a whole prompt without a tile of a single query, which padding would round otherwise."""
        return chunk.start == 0 and chunk.sample is not None and len(chunk.token_ids) % QUERY_TILE != 1

    # What came of it

    @property
    def can_plan_ahead(self) -> bool:
        """Whether a step can be planned before the tokens of the last are known: a search's rows depend on them."""
        return not any(each.search is not None and each.phase is not Phase.WAITING for each in self._sequences.values())

    def advance(self, plan: StepPlan) -> None:
        """Record all of a step that is certain before it ends, so that the next can be planned meanwhile.

        That is where everybody will be; not which tokens will be there, nor whether one of them ends an answer.
        """
        self._under_way = plan
        for encode in plan.encodes:
            if (sequence := self._sequences.get(encode.request_id)) is not None:
                sequence.phase = self._first_phase(sequence.request)
        fed = {row.request_id: (1, row.sample) for row in plan.rows if row.request_id is not None}
        fed |= {chunk.request_id: (len(chunk.token_ids), chunk.sample) for chunk in plan.reads}
        for request_id, (num_tokens, sample) in fed.items():
            if (sequence := self._sequences.get(request_id)) is not None:
                sequence.num_computed += num_tokens
                if sample is not None:
                    sequence.phase = Phase.DECODE
                    sequence.awaits_token = True

    def still_to_do(self, plan: StepPlan) -> StepPlan | None:
        """Return what is left of a step that was planned ahead, now that it is known who has ended; None if nothing."""
        ended = plan.request_ids - self._sequences.keys()
        if ended:
            plan = plan.without(ended)
        return None if plan.is_empty else plan

    def update(self, plan: StepPlan, result: StepResult, now: float) -> list[Event]:
        """Record what came of a step. Requests that were cancelled while it ran are passed over."""
        if self._under_way is not plan:
            self.advance(plan)
        self._under_way = None
        self._charge(plan, result)
        events: list[Event] = []
        # Whatever is wrong there, nobody else begins with it; the next step's plan may have moved them elsewhere.
        self._forget(plan.slots(result.failures.keys()) if result.failures else ())
        for request_id, message in result.failures.items():
            if (sequence := self._sequences.get(request_id)) is not None:
                events.append(self._fail(sequence, message))
        self._lend(plan)
        # Where the step had them: planning the next may have moved them.
        chosen = {chunk.request_id: chunk.slot for chunk in plan.reads if chunk.sample is not None}
        for slot, row in enumerate(plan.rows, plan.first_slot):
            if row.sample is not None and row.request_id is not None:
                chosen[row.request_id] = slot
        for request_id, slot in chosen.items():
            sequence = self._sequences.get(request_id)
            if sequence is None:
                continue
            event: SearchEvent | TokenEvent | None
            if sequence.search is None:
                event = self._append(sequence, result.tokens[slot], now)
            else:
                tokens = [result.tokens[branch.slot] for branch in sequence.branches]
                event = self._search(sequence, sequence.search, tokens, now)
            if event is not None:
                events.append(event)
                if event.finish is not None:
                    self._end(sequence)
        return events

    def _lend(self, plan: StepPlan) -> None:
        """Let others begin with what was read of prompts."""
        for chunk in plan.reads:
            sequence = self._sequences.get(chunk.request_id)
            if sequence is not None and self._reuses_prefix(sequence.request):
                self._prefixes.put(sequence.branches[0].slot, Prefix(sequence.request.prompt, sequence.num_computed))

    def _charge(self, plan: StepPlan, result: StepResult) -> None:
        """Count the step's time among the tenants: of a batch in equal parts, of prompts by their tokens."""
        fed = [row.request_id for row in plan.rows if row.request_id is not None]
        num_tokens = sum(len(chunk.token_ids) for chunk in plan.reads)
        spent = [(request_id, result.decode_seconds / len(fed)) for request_id in fed]
        spent += [(each.request_id, result.encode_seconds / len(plan.encodes)) for each in plan.encodes]
        spent += [(c.request_id, result.prefill_seconds * len(c.token_ids) / num_tokens) for c in plan.reads]
        by_tenant: defaultdict[str, float] = defaultdict(float)
        for request_id, seconds in spent:
            if (sequence := self._sequences.get(request_id)) is not None:
                by_tenant[sequence.tenant] += seconds
        for tenant, seconds in by_tenant.items():
            self._shares.charge(tenant, seconds)

    def _fail(self, sequence: LiveSequence, message: str) -> FailureEvent:
        self._forget(sequence.slots)
        self.cancel(sequence.request.request_id)
        return FailureEvent(sequence.request, message)

    def _append(self, sequence: LiveSequence, token: Token, now: float) -> TokenEvent:
        """Give a sequence its next token."""
        (branch,), request = sequence.branches, sequence.request
        is_first = sequence.first_token_at is None
        gap_seconds = now - (request.arrival if is_first else sequence.last_token_at)
        sequence.take_token(now)
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

    def _search(
        self, sequence: LiveSequence, search: BeamSearch, tokens: Sequence[Token], now: float
    ) -> SearchEvent | None:
        """Give each beam its next token; return what was found once the search is over."""
        sequence.take_token(now)
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

    def _end(self, sequence: LiveSequence) -> None:
        request = sequence.request
        if request.beam is None:
            self._forecast.lengths.observe(request.max_tokens, sequence.num_output)
        self.cancel(request.request_id)

    def _branch(self, sequence: LiveSequence, going: Sequence[Continuation]) -> None:
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
            new.append(Branch(slot, [*parent.output, continuation.token_id], continuation.log_likelihood))
        sequence.branches, sequence.spare_slots = new, free

    # What it looks like

    def snapshot(self) -> Snapshot:
        """Return the whole state as a value."""
        return Snapshot(
            config=self.config,
            sequences=tuple(view_of(sequence) for sequence in self._sequences.values()),
            free_slots=self._ledger.free,
            reserved=self._ledger.reserved,
            committed=self._ledger.committed,
        )

    def occupancy(self) -> Occupancy:
        """Return how much there is to do; a replay of the canary is nobody's request."""
        num_waiting = num_running = num_uncomputed = 0
        for request_id, sequence in self._sequences.items():
            if is_replay(request_id):
                continue
            if sequence.phase is Phase.WAITING:
                num_waiting += 1
            else:
                num_running += 1
            num_uncomputed += max(0, len(sequence.request.prompt) - sequence.num_computed)
        return Occupancy(
            num_waiting=num_waiting,
            num_running=num_running,
            num_uncomputed=num_uncomputed,
            reserved=self._ledger.reserved,
            committed=self._ledger.committed,
        )

    def _in(self, phase: Phase) -> list[LiveSequence]:
        return [sequence for sequence in self._sequences.values() if sequence.phase is phase]


def _sample(sequence: LiveSequence, branch: Branch) -> Sample:
    request, num_output = sequence.request, sequence.num_output
    return Sample(request, len(request.prompt) + num_output, num_output, branch.output)


def _times(sequence: LiveSequence) -> tuple[float, float]:
    """Return the seconds in the queue and in prefill of a sequence that has its first token."""
    assert sequence.prefill_started_at is not None and sequence.first_token_at is not None
    queue_seconds = sequence.prefill_started_at - sequence.request.arrival
    return queue_seconds, sequence.first_token_at - sequence.prefill_started_at


def _finish(sequence: LiveSequence, reason: FinishReason, hypotheses: tuple[Hypothesis, ...] = ()) -> Finish:
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


def _slack(request: Request, now: float) -> float:
    """Return the seconds that are left until its deadline; without one they have no end."""
    return inf if request.deadline is None else request.deadline - now
