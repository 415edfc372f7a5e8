"""`grpc.health.v1.Health`, per server, service and model.

The library's own asyncio servicer drops the other watchers of a name when one of them leaves, and holds a lock while it
writes to a slow one; here a watcher is an event of its own.
"""

import asyncio
from collections.abc import Mapping

import grpc
from grpc_health.v1 import health_pb2 as pb

from service.rpc.registration import Context

SERVING = pb.HealthCheckResponse.SERVING
NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService:
    """Says what it was last told by `update`; belongs to the event loop."""

    def __init__(self) -> None:
        self._healthy: dict[str, bool] = {}
        self._watchers: set[asyncio.Event] = set()
        self._closed = False

    def update(self, healthy: Mapping[str, bool]) -> None:
        """Replace what is known: whether each name serves."""
        if healthy != self._healthy:
            self._healthy = dict(healthy)
            self._wake()

    def close(self) -> None:
        """End every watch after its last status, so that no watcher holds up the server's end."""
        self._closed = True
        self._wake()

    def is_healthy(self, name: str) -> bool:
        """Whether a name serves; may be asked from any thread."""
        return self._healthy.get(name, False)

    async def Check(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        """Return the status of one name."""
        if request.service not in self._healthy:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"nothing here is called {request.service[:80]!r}")
        return pb.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: pb.HealthCheckRequest, context: Context) -> None:
        """Write the status of one name, and again whenever it has changed."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        last = None
        try:
            while True:
                changed.clear()
                if (status := self._status(request.service)) != last:
                    await context.write(pb.HealthCheckResponse(status=status))
                    last = status
                    continue  # it may have changed during the write
                if self._closed:
                    return
                await changed.wait()
        finally:
            self._watchers.discard(changed)

    def _status(self, name: str) -> int:
        if name not in self._healthy:
            return SERVICE_UNKNOWN
        return SERVING if self._healthy[name] else NOT_SERVING

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.set()
