"""The gRPC server and the two ports."""

from collections.abc import Callable, Sequence

import grpc

from service.app.start_error import StartError
from service.metrics import MetricsEndpoint, ModelState, ServerMetrics
from service.settings import Settings

_MAX_STREAMS_PER_CONNECTION = 1000


def build_server(settings: Settings) -> grpc.aio.Server:
    """Return a server without services or ports."""
    # Without a limit to the grace after it, the age of a connection ends no request.
    age = settings.max_connection_age_seconds
    aging = [("grpc.max_connection_age_ms", int(age * 1000))] if age else []
    return grpc.aio.server(
        options=[
            *aging,
            ("grpc.so_reuseport", 0),  # or a second server would silently share the port
            ("grpc.max_receive_message_length", int(settings.max_message_bytes)),
            ("grpc.max_send_message_length", int(settings.max_message_bytes)),
            ("grpc.max_concurrent_streams", _MAX_STREAMS_PER_CONNECTION),
            ("grpc.keepalive_time_ms", int(settings.keepalive_seconds * 1000)),
            ("grpc.keepalive_timeout_ms", int(settings.keepalive_timeout_seconds * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ]
    )


def open_grpc_port(server: grpc.aio.Server, settings: Settings) -> int:
    """Listen for gRPC and return the port.

    Raises:
        StartError: the port is taken.
    """
    address = _address(settings.host, settings.port)
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartError(f"cannot listen on {address} (--port): does another server?") from error


def open_metrics_port(
    metrics: ServerMetrics,
    settings: Settings,
    *,
    alive: Callable[[], bool],
    ready: Callable[[], bool],
    models: Callable[[], Sequence[ModelState]],
) -> MetricsEndpoint:
    """Listen for HTTP.

    Raises:
        StartError: the port is taken.
    """
    try:
        host, port = settings.host, settings.metrics_port
        return MetricsEndpoint(metrics, host=host, port=port, alive=alive, ready=ready, models=models)
    except OSError as error:
        address = _address(settings.host, settings.metrics_port)
        raise StartError(f"cannot listen on {address} (--metrics-port): {error.strerror}") from error


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
