"""Errors as the caller sees them: the one place that turns the domain's errors into gRPC codes.

docs/errors.md lists the reasons. What is not of `service.errors` is a fault of ours: the caller gets a constant
sentence and an id, the log gets the same id and the traceback.
"""

import logging
import secrets

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from service import errors

logger = logging.getLogger(__name__)

DOMAIN = "attendant"
UNKNOWN_FAULT = "The server failed on this request through a fault of its own; its log says more."
_MAX_TEXT = 600  # characters; a status travels in headers, which clients accept up to 8 KiB in all

_CODES: dict[type[errors.AttendantError], StatusCode] = {
    errors.InvalidField: StatusCode.INVALID_ARGUMENT,
    errors.ContextLengthExceeded: StatusCode.INVALID_ARGUMENT,
    errors.TextTooLong: StatusCode.INVALID_ARGUMENT,
    errors.Unsupported: StatusCode.UNIMPLEMENTED,
    errors.ModelNotFound: StatusCode.NOT_FOUND,
    errors.ModelUnavailable: StatusCode.UNAVAILABLE,
    errors.QueueFull: StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: StatusCode.DEADLINE_EXCEEDED,
    errors.DeadlineUnreachable: StatusCode.DEADLINE_EXCEEDED,
    errors.Draining: StatusCode.UNAVAILABLE,
    errors.ExecutionFailed: StatusCode.INTERNAL,
}


def code_of(error: Exception) -> StatusCode:
    """Return the gRPC code of an error."""
    return _CODES.get(type(error), StatusCode.INTERNAL)  # type: ignore[arg-type]  # a stranger's type is not found


def to_status(error: Exception) -> status_pb2.Status:
    """Return what the caller is told; an error that is not of the domain is logged in full here."""
    if not isinstance(error, errors.AttendantError) or type(error) not in _CODES:
        return _unknown(error)
    details: list[Message] = [_error_info(error.reason, error.metadata)]
    if isinstance(error, errors.InvalidField):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=_shortened(error.limit))
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, errors.QueueFull | errors.ModelUnavailable) and error.retry_after_seconds is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=to_duration(error.retry_after_seconds)))
    return _status(code_of(error), error.message, details)


def to_duration(seconds: float) -> duration_pb2.Duration:
    """Return seconds as a Duration; what clocks make negative becomes zero."""
    nanoseconds = max(0, round(seconds * 1e9))
    return duration_pb2.Duration(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)


def _unknown(error: Exception) -> status_pb2.Status:
    error_id = secrets.token_hex(8)
    logger.error("fault %s", error_id, exc_info=error)
    return _status(StatusCode.INTERNAL, UNKNOWN_FAULT, [_error_info("INTERNAL", {"error_id": error_id})])


def _error_info(reason: str, metadata: dict[str, str]) -> error_details_pb2.ErrorInfo:
    short = {key: _shortened(value) for key, value in metadata.items()}
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=short)


def _status(code: StatusCode, message: str, details: list[Message]) -> status_pb2.Status:
    packed = [any_pb2.Any() for _ in details]
    for target, detail in zip(packed, details, strict=True):
        target.Pack(detail)
    return status_pb2.Status(code=code.value[0], message=_shortened(message), details=packed)


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."
