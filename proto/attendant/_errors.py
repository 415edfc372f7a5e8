"""What a call can end in, told apart by what the caller can do about it.

AttendantError         everything below; also for gRPC codes that have no class here
|- InvalidRequest      the request can never be served as it is; `field_violations` name the fields
|- ModelNotFound       no such model or version
|- Overloaded          the server has no room now; `retry_after` seconds is its guess at when it will
|- Unavailable         no server, one that is stopping, or a model that is not served
|- DeadlineExceeded    the timeout passed, or could not have been kept
|- Cancelled           the call was cancelled, by this side most likely
'- ServerError         the server failed; its log knows more
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of the request that was refused, and why."""

    field: str
    description: str


class AttendantError(Exception):
    """A call that failed.

    Attributes:
        code: the gRPC code.
        reason: UPPER_SNAKE, stable, for programs ("QUEUE_FULL"); empty if the answer was not Attendant's.
        message: for people.
        metadata: further facts about `reason`, flat text.
        field_violations: refused fields, if any.
        retry_after: seconds after which it is worth trying again, if the server said so.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        field_violations: tuple[FieldViolation, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.field_violations = field_violations
        self.retry_after = retry_after


class InvalidRequest(AttendantError):
    """The request can never be served as it is."""


class ModelNotFound(AttendantError):
    """No model of that name or version."""


class Overloaded(AttendantError):
    """The server has no room now."""


class Unavailable(AttendantError):
    """Nobody serves it: no server, one that is stopping, or a model that is not served."""


class DeadlineExceeded(AttendantError):
    """The timeout passed, or the server knew that it could not keep it."""


class Cancelled(AttendantError):
    """The call was cancelled."""


class ServerError(AttendantError):
    """The server failed."""


_CLASSES: dict[grpc.StatusCode, type[AttendantError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.DATA_LOSS: ServerError,
}


class _Call(Protocol):
    def code(self) -> grpc.StatusCode: ...

    def details(self) -> str | None: ...


def from_rpc_error(error: grpc.RpcError) -> AttendantError:
    """Return the client's error for a failed call, with what google.rpc.Status tells about it."""
    call = cast(_Call, error)  # in both of gRPC's APIs an error is also the call; only one says so by its type
    code = call.code()
    reason, metadata = "", dict[str, str]()
    violations: list[FieldViolation] = []
    retry_after: float | None = None
    for detail in _details(call):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest.FromString(detail.value)
            violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
            retry_after = retry.seconds + retry.nanos / 1e9
    return _CLASSES.get(code, AttendantError)(
        call.details() or "",
        code=code,
        reason=reason,
        metadata=metadata,
        field_violations=tuple(violations),
        retry_after=retry_after,
    )


def _details(call: _Call) -> Iterable[Any]:
    try:
        status = rpc_status.from_call(cast(grpc.Call, call))
    except (DecodeError, ValueError):  # something between us and the server rewrote the status
        return ()
    return () if status is None else status.details
