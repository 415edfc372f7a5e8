"""Errors reach the caller with code, reason and details; faults of ours as a constant sentence."""

import logging
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from service import errors
from service.rpc.status import UNKNOWN_FAULT, code_of, to_duration, to_status


def detail(status: status_pb2.Status, kind: type[Message]) -> Message | None:
    for packed in status.details:
        unpacked = kind()
        if packed.Unpack(unpacked):
            return unpacked
    return None


ERRORS = [
    (errors.InvalidField("sampling.top_p", 1.1, "must be in (0, 1]"), "INVALID_ARGUMENT", "INVALID_FIELD"),
    (
        errors.ContextLengthExceeded(prompt_tokens=9, max_tokens=9, limit=16, limit_name="max_model_len"),
        "INVALID_ARGUMENT",
        "CONTEXT_LENGTH_EXCEEDED",
    ),
    (
        errors.TextTooLong(field="inputs[3]", tokens=300, limit=256),
        "INVALID_ARGUMENT",
        "CONTEXT_LENGTH_EXCEEDED",
    ),
    (errors.Unsupported("sampling.n is 2"), "UNIMPLEMENTED", "UNSUPPORTED"),
    (errors.ModelNotFound("there is no model 'x'"), "NOT_FOUND", "MODEL_NOT_FOUND"),
    (errors.ModelUnavailable("model x/1 is not served"), "UNAVAILABLE", "MODEL_UNAVAILABLE"),
    (errors.QueueFull("9 requests run or wait", 1.5, {"requests": "9"}), "RESOURCE_EXHAUSTED", "QUEUE_FULL"),
    (errors.DeadlineExceeded(seconds=1.5, phase="decode", tokens=7), "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
    (
        errors.DeadlineUnreachable(predicted_seconds=3.0, budget_seconds=1.0, num_waiting=4, num_running=8),
        "DEADLINE_EXCEEDED",
        "DEADLINE_UNREACHABLE",
    ),
    (errors.Draining("the server is stopping"), "UNAVAILABLE", "SERVER_DRAINING"),
    (errors.ExecutionFailed("the graph failed"), "INTERNAL", "EXECUTION_FAILED"),
]


def test_every_error_of_the_domain_has_a_code() -> None:
    concrete = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert concrete - {errors.AttendantError} == {type(error) for error, _, _ in ERRORS}


@pytest.mark.parametrize(("error", "code", "reason"), ERRORS)
def test_an_error_of_the_domain_keeps_its_message_reason_and_metadata(
    error: errors.AttendantError, code: str, reason: str
) -> None:
    status = to_status(error)
    assert code_of(error).name == code
    assert status.code == grpc.StatusCode[code].value[0]
    assert status.message == error.message
    info = detail(status, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain, dict(info.metadata)) == (reason, "attendant", error.metadata)


def test_a_bad_field_comes_as_a_bad_request() -> None:
    bad = detail(to_status(ERRORS[0][0]), error_details_pb2.BadRequest)
    violation = bad.field_violations[0]
    assert (violation.field, violation.description) == ("sampling.top_p", "must be in (0, 1]")


def test_a_full_queue_says_when_to_retry() -> None:
    retry = detail(to_status(errors.QueueFull("full", 1.5)), error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 1500


@pytest.mark.parametrize("error", [RuntimeError("secret"), KeyError("secret"), errors.AttendantError("secret")])
def test_a_fault_of_ours_is_a_constant_sentence_for_the_caller_and_a_traceback_in_the_log(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error

    with caplog.at_level(logging.ERROR), pytest.raises(type(error)):
        fail()
    status = to_status(error)
    assert status.message == UNKNOWN_FAULT
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    info = detail(status, error_details_pb2.ErrorInfo)
    assert info.reason == "INTERNAL"
    assert "secret" not in str(status)
    assert info.metadata["error_id"] in caplog.text
    assert "in fail" in caplog.text, "the traceback"


def test_a_status_fits_into_headers_however_long_its_message() -> None:
    status = to_status(errors.InvalidField("messages", ["user"] * 1000, "the template says: " + "é" * 100_000))
    assert status.ByteSize() < 6000


@pytest.mark.parametrize(("seconds", "nanoseconds"), [(0.0, 0), (-1e-9, 0), (1.25, 1_250_000_000)])
def test_durations_are_exact_and_never_negative(seconds: float, nanoseconds: int) -> None:
    assert to_duration(seconds).ToNanoseconds() == nanoseconds


def test_every_reason_is_in_the_table_for_people() -> None:
    table = (Path(__file__).parents[3] / "docs" / "errors.md").read_text("utf-8")
    for _, code, reason in ERRORS:
        assert f"| `{reason}` | {code} |" in table
