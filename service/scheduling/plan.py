"""What one step does, and what came of it: frozen values, the only things that cross from scheduling to the engine.

Slots are rows of the state pools. A step reads the sources of new sequences, runs a range of slots as decode rows,
whatever slot in that range is idle or still being prefilled included ("parked": it computes into its next free
position, which is written again before it is ever read, and what it would replace stays as it is), then whole prompts
together, and then chunks of prompts.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import NamedTuple

from service.scheduling.request import Finish, Request, Source, Token


class Sample(NamedTuple):
    """Choose a token for `request` at `position`; the first `num_output` tokens of `output` were generated so far.

    When a step is planned, the last of them may not be there yet; when it runs, it is.
    """

    request: Request
    position: int
    num_output: int
    output: Sequence[int] = ()

    @property
    def generated(self) -> Sequence[int]:
        """What was generated so far: `output` goes on growing."""
        return self.output[: self.num_output]


class Row(NamedTuple):
    """One slot of the decode rows: feed `tokens[place]` at position `length - 1`; a parked row is nobody's.

    The tokens are a prompt, or an answer in the making: its last token may still be computed when a step is planned.
    Without a `sample` the token is one of a prompt, and not its last.
    """

    request_id: str | None
    tokens: Sequence[int]
    place: int
    length: int
    sample: Sample | None

    @property
    def token_id(self) -> int:
        """What is fed, known when the step runs."""
        return self.tokens[self.place]

    @classmethod
    def parked(cls, length: int) -> "Row":
        """Return a row that is nobody's."""
        return cls(None, (0,), 0, length, None)


@dataclass(frozen=True, slots=True)
class Encode:
    """Begin a sequence in a slot with what the encode graph makes of its source."""

    request_id: str
    slot: int
    source: Source


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prefill positions [start, start + len(token_ids)) of one slot; with `sample`, the prompt ends here."""

    request_id: str
    slot: int
    start: int
    token_ids: tuple[int, ...]
    sample: Sample | None


@dataclass(frozen=True, slots=True)
class Release:
    """Give the memory of a slot back."""

    slot: int


@dataclass(frozen=True, slots=True)
class Move:
    """Copy a sequence of `length` positions from one slot to another."""

    source: int
    destination: int
    length: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: first `memory`, in its order, then `encodes`, the decode rows, the `prompts`, and the chunks.

    Row i is slot `first_slot` + i. The prompts are whole, lie in neighbouring slots, in their order, and are read in
    one run, padded to the longest.
    """

    memory: tuple[Release | Move, ...] = ()
    encodes: tuple[Encode, ...] = ()
    first_slot: int = 0
    rows: tuple[Row, ...] = ()
    prompts: tuple[Chunk, ...] = ()
    chunks: tuple[Chunk, ...] = ()

    @property
    def reads(self) -> tuple[Chunk, ...]:
        """All that is read of prompts, together or not."""
        return self.prompts + self.chunks

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.memory or self.encodes or self.rows or self.reads)

    @property
    def request_ids(self) -> set[str]:
        """Whom the step is for."""
        found = {row.request_id for row in self.rows if row.request_id is not None}
        return found.union((each.request_id for each in self.encodes), (each.request_id for each in self.reads))

    def slots(self, request_ids: Set[str]) -> set[int]:
        """Return where the step computes for some requests."""
        found = {slot for slot, row in enumerate(self.rows, self.first_slot) if row.request_id in request_ids}
        found.update(encode.slot for encode in self.encodes if encode.request_id in request_ids)
        found.update(chunk.slot for chunk in self.reads if chunk.request_id in request_ids)
        return found

    def without(self, request_ids: Set[str]) -> "StepPlan":
        """Return the plan for when some requests have ended; all that was decided of memory stays."""
        rows = tuple(Row.parked(row.length) if row.request_id in request_ids else row for row in self.rows)
        prompts, chunks = self.prompts, self.chunks
        if any(prompt.request_id in request_ids for prompt in prompts):  # which are no neighbours any more
            prompts, chunks = (), self.reads
        return replace(
            self,
            encodes=tuple(encode for encode in self.encodes if encode.request_id not in request_ids),
            rows=rows if any(row.request_id is not None for row in rows) else (),
            prompts=prompts,
            chunks=tuple(chunk for chunk in chunks if chunk.request_id not in request_ids),
        )

    @property
    def prompt_padding(self) -> int:
        """Tokens behind the ends of the prompts that are read together."""
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        return len(lengths) * max(lengths, default=0) - sum(lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What the engine made of a plan: a token for each sample, by slot, or a failure, by request; and the times."""

    tokens: Mapping[int, Token]
    failures: Mapping[str, str]
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0


class TokenEvent(NamedTuple):
    """A request got a token; with `finish` it was the last one.

    `gap_seconds` is the time since its previous token, or since arrival for the first (`is_first`), which also carries
    the time in the queue and in prefill. `cached_tokens` of its prompt were copied, not computed.
    """

    request: Request
    token: Token
    context_tokens: int
    is_first: bool
    gap_seconds: float
    queue_seconds: float
    prefill_seconds: float
    cached_tokens: int
    finish: Finish | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchEvent:
    """A beam search is over; its answers are in `finish`."""

    request: Request
    finish: Finish
    queue_seconds: float
    prefill_seconds: float
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class ExpiryEvent:
    """A request's deadline has passed; it was in `phase` and had got `num_tokens`."""

    request: Request
    phase: str
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalEvent:
    """A request will not be finished in time, and ends before it costs anything.

    It would take `predicted_seconds` from its arrival; of others, `num_waiting` waited and `num_running` ran.
    """

    request: Request
    predicted_seconds: float
    num_waiting: int
    num_running: int


@dataclass(frozen=True, slots=True)
class FailureEvent:
    """A request ended because the graph failed on it."""

    request: Request
    message: str


Event = TokenEvent | SearchEvent | ExpiryEvent | RefusalEvent | FailureEvent
