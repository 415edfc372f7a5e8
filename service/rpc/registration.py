"""Hooks a servicer's methods up with gRPC: tolerant parsing, errors to status, and a count of how each call ended.

A servicer's method is `async def Method(request, context)`; a streaming one writes to the context. It raises what is in
`service.errors`; nothing it raises reaches the caller as it is.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from grpc_status import rpc_status

from service.metrics import MethodMetrics, ServerMetrics
from service.rpc.malformed import Malformed, tolerant
from service.rpc.status import code_of, to_status

Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[Any, Context], Awaitable[Any]]
Ended = Callable[[str, Message | None, grpc.StatusCode], None]
"""Called with the method's name, the request (None if it could not be parsed) and the code, once for each call."""

_EARLY_SECONDS = 0.1


def handlers(
    service: ServiceDescriptor, servicer: object, metrics: ServerMetrics, ended: Ended | None = None
) -> grpc.GenericRpcHandler:
    """Return what a server needs to answer a service's calls with a servicer."""
    by_name = {
        method.name: _handler(
            method,
            getattr(servicer, method.name),
            metrics.method(service.full_name, method.name, streams=method.server_streaming),
            ended or _ignore,
        )
        for method in service.methods
    }
    return grpc.method_handlers_generic_handler(service.full_name, by_name)


def _ignore(method: str, request: Message | None, code: grpc.StatusCode) -> None:
    pass


def _handler(method: MethodDescriptor, function: Method, metrics: MethodMetrics, ended: Ended) -> Any:
    make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
    return make(
        _guarded(method.name, function, metrics, ended),
        request_deserializer=tolerant(message_factory.GetMessageClass(method.input_type)),
        response_serializer=_counted(message_factory.GetMessageClass(method.output_type), metrics),
    )


def _counted(message_type: type[Message], metrics: MethodMetrics) -> Callable[[Message], bytes]:
    def serialize(message: Message) -> bytes:
        metrics.sent()
        return message_type.SerializeToString(message)

    return serialize


def _guarded(name: str, function: Method, metrics: MethodMetrics, ended: Ended) -> Any:
    async def answer(request: Message | Malformed, context: Context) -> Any:
        started = time.perf_counter()
        metrics.started()
        code = grpc.StatusCode.OK
        try:
            if isinstance(request, Malformed):
                raise request.explain()
            return await function(request, context)
        except asyncio.CancelledError:
            code = ended_by(context)
            raise
        except grpc.aio.AbortError:
            code = context.code()  # the servicer has said all there is to say
            raise
        except Exception as error:
            code = code_of(error)
            await context.abort_with_status(rpc_status.to_status(to_status(error)))
        finally:
            metrics.ended(code.name, time.perf_counter() - started)
            ended(name, None if isinstance(request, Malformed) else request, code)

    return answer


def ended_by(context: Context) -> grpc.StatusCode:
    """Return why gRPC cancelled a call: its deadline passed, or the client went away.

    A client gives up at its own deadline, and word of that can be here before ours has passed.
    """
    remaining = context.time_remaining()
    expired = remaining is not None and remaining <= _EARLY_SECONDS
    return grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
