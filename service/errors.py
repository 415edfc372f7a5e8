"""Everything that can go wrong for a caller, in the domain's words.

    AttendantError            has a stable `reason`, a message for people and `metadata` for machines
    |- InvalidField           a field of the request is out of range, contradictory or malformed
    |- ContextLengthExceeded  prompt and answer together cannot fit
    |- TextTooLong            a text to be read has more tokens than the model takes
    |- Unsupported            declared in the API, but not by this build or this bundle
    |- ModelNotFound          no bundle of that name or version
    |- ModelUnavailable       the bundle was refused, is loading or has failed
    |- QueueFull              as many requests wait as may; worth trying again later
    |- DeadlineExceeded       the answer was not finished within the latency budget
    |- DeadlineUnreachable    as foreseen, the answer would not be finished within the latency budget
    |- Draining               the server is going away; worth trying elsewhere
    '- ExecutionFailed        the graph failed on this request

`service/rpc/status.py` is the one place that turns them into gRPC codes. Anything else that reaches it is a bug of
ours: the caller gets a constant sentence and the log gets the traceback.
"""

from collections.abc import Mapping


class AttendantError(Exception):
    """An error with a caller: `reason` is UPPER_SNAKE and stable, `metadata` is flat text."""

    reason = "INTERNAL"

    def __init__(self, message: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: dict[str, str] = dict(metadata or {})


class InvalidField(AttendantError):
    """A field of the request cannot be taken; names the field, its value and what is allowed."""

    reason = "INVALID_FIELD"

    def __init__(self, field: str, value: object, limit: str) -> None:
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field} is {shown}: {limit}", {"field": field, "value": shown, "limit": limit})
        self.field = field
        self.limit = limit


class ContextLengthExceeded(AttendantError):
    """Prompt and answer cannot fit into the model's context or the server's KV memory."""

    reason = "CONTEXT_LENGTH_EXCEEDED"

    def __init__(self, *, prompt_tokens: int, max_tokens: int, limit: int, limit_name: str) -> None:
        super().__init__(
            f"prompt of {prompt_tokens} tokens + sampling.max_tokens {max_tokens} "
            f"exceed {limit_name} of {limit} tokens",
            {"prompt_tokens": str(prompt_tokens), "max_tokens": str(max_tokens), limit_name: str(limit)},
        )


class TextTooLong(AttendantError):
    """A text has more tokens than the model reads."""

    reason = "CONTEXT_LENGTH_EXCEEDED"

    def __init__(
        self,
        *,
        field: str,
        tokens: int,
        limit: int,
        limit_name: str = "max_model_len",
        advice: str = "shorten it, or set truncate",
    ) -> None:
        super().__init__(
            f"{field} has {tokens} tokens, more than {limit_name} of {limit}; {advice}",
            {"field": field, "tokens": str(tokens), limit_name: str(limit)},
        )


class Unsupported(AttendantError):
    """The API declares it, this build or bundle does not do it."""

    reason = "UNSUPPORTED"


class ModelNotFound(AttendantError):
    """No bundle of that name or version."""

    reason = "MODEL_NOT_FOUND"


class ModelUnavailable(AttendantError):
    """The bundle is known but not served: refused, loading or failed; `retry_after_seconds` if it may be soon."""

    reason = "MODEL_UNAVAILABLE"

    def __init__(
        self, message: str, metadata: Mapping[str, str] | None = None, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(message, metadata)
        self.retry_after_seconds = retry_after_seconds


class QueueFull(AttendantError):
    """As many requests wait as may; `retry_after_seconds` is a guess at when one more would fit."""

    reason = "QUEUE_FULL"

    def __init__(self, message: str, retry_after_seconds: float, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message, metadata)
        self.retry_after_seconds = retry_after_seconds


class DeadlineExceeded(AttendantError):
    """A request's time is over: `tokens` of its answer were generated, none if it still waited or was being read."""

    reason = "DEADLINE_EXCEEDED"

    def __init__(self, *, seconds: float, phase: str, tokens: int) -> None:
        super().__init__(
            f"{seconds:.3g} s after it came the request was not finished ({phase}, {tokens} tokens generated); "
            "allow more time, ask for fewer tokens, or try again when less is going on",
            {"seconds": f"{seconds:.6f}", "phase": phase, "tokens": str(tokens)},
        )


class DeadlineUnreachable(AttendantError):
    """A request was turned away before it cost anything: from its arrival it would take longer than it may."""

    reason = "DEADLINE_UNREACHABLE"

    def __init__(self, *, predicted_seconds: float, budget_seconds: float, num_waiting: int, num_running: int) -> None:
        super().__init__(
            f"it would take {predicted_seconds:.3g} s, as things are, and has {budget_seconds:.3g} s "
            f"({num_running} requests run, {num_waiting} wait); allow more time, ask for less, or try elsewhere",
            {
                "predicted_seconds": f"{predicted_seconds:.6f}",
                "budget_seconds": f"{budget_seconds:.6f}",
                "waiting": str(num_waiting),
                "running": str(num_running),
            },
        )


class Draining(AttendantError):
    """The server takes no new requests because it is stopping."""

    reason = "SERVER_DRAINING"


class ExecutionFailed(AttendantError):
    """Running the graph failed for this request; its neighbours are not affected."""

    reason = "EXECUTION_FAILED"
