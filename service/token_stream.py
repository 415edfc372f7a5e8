"""The stream of one request, between the engine loop that fills it and the call that reads it; both on the event loop.

Every stream ends in exactly one way: an item with `finish`, an error, or its own `cancel`.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from service.errors import AttendantError
from service.scheduling.plan import SearchEvent, TokenEvent
from service.scheduling.request import Finish, Request, Token


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What a stream got since it was last read, oldest first; with `finish` there is no more.

    A beam search has no tokens of its own: its answers are in `finish`.
    """

    tokens: tuple[Token, ...]
    finish: Finish | None


class TokenStream:
    """The tokens of one request, on the event loop: an async iterator of `StepTokens`.

    `queue_seconds`, `prefill_seconds` and `cached_tokens` of the prompt are known from the first token on.

    Args:
        request: it.
        forget: is told when its caller gives it up.
    """

    def __init__(self, request: Request, forget: Callable[[str], None]) -> None:
        self.request = request
        self.queue_seconds = 0.0
        self.prefill_seconds = 0.0
        self.cached_tokens = 0
        self._forget = forget
        self._tokens: list[Token] = []
        self._finish: Finish | None = None
        self._error: AttendantError | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StepTokens:
        """Wait for tokens.

        Raises:
            ExecutionFailed: the graph failed on this request.
            DeadlineExceeded: its time is over.
            DeadlineUnreachable: its time would be over before it was finished.
            Draining: the server stopped before the request was finished.
        """
        while not (self._tokens or self._finish or self._error or self._ended):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._tokens or self._finish:
            item = StepTokens(tuple(self._tokens), self._finish)
            self._tokens, self._finish = [], None
            self._ended = self._ended or item.finish is not None
            return item
        if self._error is not None and not self._ended:
            self._ended = True
            raise self._error
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Give the request up; its slot is free before the next step. Does nothing once the request has ended."""
        self._ended = True
        self._forget(self.request.request_id)
        self._wake()

    def deliver(self, event: TokenEvent | SearchEvent) -> None:
        """Add what a step brought."""
        if isinstance(event, TokenEvent):
            self._tokens.append(event.token)
        self.queue_seconds, self.prefill_seconds = event.queue_seconds, event.prefill_seconds
        self.cached_tokens = event.cached_tokens
        self._finish = event.finish
        self._wake()

    def fail(self, error: AttendantError) -> None:
        """End with an error."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
