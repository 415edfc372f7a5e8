"""The invariance canary: a finished request is computed once more, alone, and its tokens are compared.

That an answer does not depend on its neighbours is proved for every bundle when it is loaded, on a few rows of a few
lengths. The canary watches it on what is really asked for: on every length, batch and copied beginning that comes.

Pure bookkeeping: the caller says what is submitted and what comes of it, asks for a replay whenever nobody needs the
engine, and interrupts the replay when somebody does. There is one request at a time, from its choice to its verdict.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from service.scheduling.plan import Event, TokenEvent
from service.scheduling.request import Request, Token

Result = Literal["same", "different", "skipped"]

PATIENCE_SECONDS = 60.0
"""How long a finished request waits for an engine that is idle."""

_PREFIX = "canary/"
_LOWEST = -(2**31)


def is_replay(request_id: str) -> bool:
    """Whether a request is nobody's but the canary's."""
    return request_id.startswith(_PREFIX)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a replay; `position` is that of the first token of the answer that differs."""

    request_id: str
    result: Result
    position: int | None = None


@dataclass(slots=True)
class _Subject:
    request: Request
    tokens: list[Token] = field(default_factory=list)
    expires: float | None = None  # once it has finished
    replay_id: str | None = None  # while it is replayed
    replayed: list[Token] = field(default_factory=list)


class Canary:
    """Chooses requests, and says how their replays came out.

    Args:
        rate: share of the greedy requests without beam search that are replayed, in [0, 1].
        report: told every verdict.
    """

    def __init__(self, rate: float, report: Callable[[Verdict], None]) -> None:
        self._rate = rate
        self._report = report
        self._credit = 0.0
        self._attempts = 0
        self._subject: _Subject | None = None

    @property
    def is_replaying(self) -> bool:
        """Whether a replay is on its way."""
        return self._subject is not None and self._subject.replay_id is not None

    def admit(self, request: Request) -> None:
        """Hear of a request that was taken, and perhaps choose it."""
        if not request.sampling.is_greedy or request.beam is not None:
            return
        self._credit = min(1.0, self._credit + self._rate)
        if self._subject is None and self._credit >= 1.0:
            self._credit = 0.0
            self._subject = _Subject(request)

    def lose(self, request_id: str) -> None:
        """Hear that a request was given up; the next one is chosen instead."""
        subject = self._subject
        if subject is not None and subject.expires is None and subject.request.request_id == request_id:
            self._subject, self._credit = None, 1.0

    def hear(self, event: Event, now: float) -> bool:
        """Hear what came of a request; return whether that was a replay, and so nobody else's business."""
        request_id, subject = event.request.request_id, self._subject
        if subject is not None and request_id == subject.replay_id:
            self._hear_replay(subject, event)
        elif subject is not None and request_id == subject.request.request_id and subject.expires is None:
            if not isinstance(event, TokenEvent):
                self.lose(request_id)
                return False
            subject.tokens.append(event.token)
            if event.finish is not None:
                subject.expires = now + PATIENCE_SECONDS
        return is_replay(request_id)

    def next_replay(self, now: float) -> Request | None:
        """Return a request to be computed now, if one is due: without deadline, and without help from other prompts."""
        self.expire(now)
        subject = self._subject
        if subject is None or subject.expires is None or subject.replay_id is not None:
            return None
        self._attempts += 1
        subject.replay_id, subject.replayed = f"{_PREFIX}{self._attempts}", []
        return replace(
            subject.request,
            request_id=subject.replay_id,
            max_tokens=len(subject.tokens),
            min_tokens=min(subject.request.min_tokens, len(subject.tokens)),
            priority=_LOWEST,
            tenant="",
            arrival=now,
            deadline=None,
            may_reuse=False,
        )

    def interrupt(self) -> str | None:
        """Give the replay up that is on its way, to begin anew later; return its id, or None if there is none."""
        if self._subject is None or self._subject.replay_id is None:
            return None
        replay_id, self._subject.replay_id = self._subject.replay_id, None
        return replay_id

    def expire(self, now: float) -> None:
        """Skip a request that has waited for too long."""
        subject = self._subject
        if subject is not None and subject.expires is not None and not self.is_replaying and now > subject.expires:
            self._end(subject, "skipped")

    def _hear_replay(self, subject: _Subject, event: Event) -> None:
        if isinstance(event, TokenEvent):
            subject.replayed.append(event.token)
            if event.finish is None:
                return
        position = _first_difference(subject.tokens, subject.replayed)
        self._end(subject, "same" if position is None else "different", position)

    def _end(self, subject: _Subject, result: Result, position: int | None = None) -> None:
        self._subject = None
        self._report(Verdict(subject.request.request_id, result, position))


def _first_difference(tokens: Sequence[Token], replayed: Sequence[Token]) -> int | None:
    """Return the first place where two answers differ, in a token or, where there are any, in the bits of a logprob."""
    for position, (token, other) in enumerate(zip(tokens, replayed, strict=False)):
        if token != other:
            return position
    return None if len(tokens) == len(replayed) else min(len(tokens), len(replayed))
