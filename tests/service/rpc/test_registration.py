"""Whatever a servicer does, a call ends in one status, and strangers' exceptions stay inside."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from service.errors import QueueFull
from service.metrics import ServerMetrics
from service.rpc.health import HealthService
from service.rpc.registration import Context, handlers
from service.rpc.status import UNKNOWN_FAULT

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
SERVING, NOT_SERVING, UNKNOWN = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
    health_pb2.HealthCheckResponse.SERVICE_UNKNOWN,
)
PATIENCE = 20.0


class Failing:
    """Fails as the request's `service` says, before or after a first message."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> Message:
        if request.service == "hang":
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        if request.service == "full":
            raise QueueFull("9 requests wait", 2.5)
        raise RuntimeError(f"secret of {request.service}")

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        await context.write(health_pb2.HealthCheckResponse())
        await self.Check(request, context)


class Served:
    """A real server on a real socket, and what it counted."""

    def __init__(self, servicer: object) -> None:
        self.ended: list[tuple[str, bool, grpc.StatusCode]] = []
        self.one_ended = asyncio.Event()
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((handlers(HEALTH, servicer, ServerMetrics(), self._note),))
        self._port = self._server.add_insecure_port("127.0.0.1:0")

    def _note(self, method: str, request: Message | None, code: grpc.StatusCode) -> None:
        self.ended.append((method, request is not None, code))
        self.one_ended.set()

    async def __aenter__(self) -> "Served":
        await self._server.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self._port}")
        self.stub = health_pb2_grpc.HealthStub(self.channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self._server.stop(None)


@pytest.fixture
async def failing() -> AsyncIterator[Served]:
    async with Served(Failing()) as served:
        yield served


def request(service: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


async def test_an_unknown_exception_becomes_a_constant_sentence(
    failing: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await failing.stub.Check(request("me"))
    assert error.value.code() is grpc.StatusCode.INTERNAL
    assert error.value.details() == UNKNOWN_FAULT
    assert "secret" not in str(error.value.trailing_metadata())
    assert "secret of me" in caplog.text
    assert failing.ended == [("Check", True, grpc.StatusCode.INTERNAL)]


async def test_an_unknown_exception_within_a_stream_does_too(failing: Served, caplog: pytest.LogCaptureFixture) -> None:
    call = failing.stub.Watch(request("me"))
    assert await call.read() == health_pb2.HealthCheckResponse()
    with pytest.raises(grpc.aio.AioRpcError, match="through a fault of its own"):
        await call.read()
    assert "secret of me" in caplog.text
    assert failing.ended == [("Watch", True, grpc.StatusCode.INTERNAL)]


async def test_an_error_of_the_domain_travels_with_its_details(failing: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await failing.stub.Check(request("full"))
    status = rpc_status.from_call(error.value)
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToMilliseconds() == 2500


async def test_invalid_utf8_is_an_invalid_argument(failing: Served) -> None:
    check = failing.channel.unary_unary("/grpc.health.v1.Health/Check")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await check(b"\x0a\x02\xff\xff")
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "service is" in error.value.details()
    assert failing.ended == [("Check", False, grpc.StatusCode.INVALID_ARGUMENT)]


@pytest.mark.parametrize("timeout", [0.2, None])
async def test_a_call_that_is_given_up_is_cancelled_and_counted(failing: Served, timeout: float | None) -> None:
    call = failing.stub.Watch(request("hang"), timeout=timeout)
    await call.read()
    if timeout is None:
        call.cancel()
    await asyncio.wait_for(failing.one_ended.wait(), PATIENCE)
    expected = grpc.StatusCode.CANCELLED if timeout is None else grpc.StatusCode.DEADLINE_EXCEEDED
    assert failing.ended == [("Watch", True, expected)]


async def test_health_says_what_it_was_told() -> None:
    health = HealthService()
    health.update({"": True, "a": False})
    async with Served(health) as served:
        assert (await served.stub.Check(request(""))).status == SERVING
        assert (await served.stub.Check(request("a"))).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await served.stub.Check(request("b"))
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        assert served.ended[-1] == ("Check", True, grpc.StatusCode.NOT_FOUND)


async def test_a_watcher_sees_changes_and_outlives_other_watchers() -> None:
    health = HealthService()
    async with Served(health) as served:
        leaving, staying = (served.stub.Watch(request("a")) for _ in range(2))
        assert (await leaving.read()).status == (await staying.read()).status == UNKNOWN
        leaving.cancel()
        await asyncio.wait_for(served.one_ended.wait(), PATIENCE)
        health.update({"a": True})
        assert (await staying.read()).status == SERVING
        health.update({"a": True, "b": True})
        health.update({"a": False})
        assert (await staying.read()).status == NOT_SERVING, "what did not change for it is not repeated"
        health.close()
        assert await staying.read() is grpc.aio.EOF
