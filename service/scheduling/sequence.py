"""A request while it is here: its branches, how far it is, and how it looks from outside.

A sequence has a branch for each of its beams, and every branch a slot; without a beam search it has one.
"""

from dataclasses import dataclass, field
from enum import Enum

from service.scheduling.beam import BeamSearch
from service.scheduling.config import SchedulerConfig
from service.scheduling.forecast import Load
from service.scheduling.plan import Move
from service.scheduling.request import Request


class Phase(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(slots=True)
class Branch:
    """One answer in the making, and the slot that holds its states."""

    slot: int
    output: list[int] = field(default_factory=list)
    log_likelihood: float = 0.0  # kept by a beam search only


@dataclass(slots=True)
class LiveSequence:
    """What the scheduler knows of a request; it alone changes it."""

    request: Request
    phase: Phase = Phase.WAITING
    branches: list[Branch] = field(default_factory=list)
    spare_slots: list[int] = field(default_factory=list)  # held for beams that are not there yet
    copies: list[Move] = field(default_factory=list)  # from beams that go on twice, due before the next step
    search: BeamSearch | None = None
    tenant: str = ""  # under whose name its time is counted
    load: Load | None = None  # foreseen when it came; while it waits nothing of it gets done
    # States are written for positions [0, num_computed) of every branch, or will be by the step that is under way.
    num_computed: int = 0
    num_cached: int = 0  # of those, the ones that were copied
    awaits_token: bool = False  # of a step that is under way
    admitted_at: float = 0.0
    prefill_started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float = 0.0

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots that it holds."""
        return (*(branch.slot for branch in self.branches), *self.spare_slots)

    @property
    def num_output(self) -> int:
        """Tokens of its answer, which are as many in every branch; one that is being computed counts."""
        return len(self.branches[0].output) + self.awaits_token if self.branches else 0

    @property
    def goes_on(self) -> bool:
        """Whether there is another token to be computed, as far as is known before the last one is."""
        return self.num_output < self.request.max_tokens

    @property
    def reads_its_last(self) -> bool:
        """Whether the next token to be fed is the last there is, so that a new one follows from it."""
        return self.num_computed + 1 == len(self.request.prompt) + self.num_output

    def take_token(self, now: float) -> None:
        """Note when the token came that was awaited."""
        self.awaits_token = False
        self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """How much there is to do, and of what is held: what is told after every step.

    Args:
        num_waiting: requests without a slot.
        num_running: requests with a slot.
        num_uncomputed: prompt tokens of all of them that are not computed yet.
        reserved: positions of KV memory that running requests may need.
        committed: positions of KV memory in use, those that finished requests left included.
    """

    num_waiting: int
    num_running: int
    num_uncomputed: int
    reserved: int
    committed: int


def view_of(sequence: LiveSequence) -> SequenceView:
    """Return what a snapshot shows."""
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
