"""`attendant health`, as a container's health check runs it."""

import subprocess
import sys

import pytest

from attendant import AsyncClient, AttendantError, Client


def health(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attendant.cli", "health", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((), "readiness"), (("liveness",), "liveness"), (("--model", "tiny-fp32"), "model/tiny-fp32")],
)
def test_a_server_that_serves_is_healthy(server, arguments: tuple[str, ...], name: str) -> None:
    done = health("--server", f"127.0.0.1:{server.port}", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{name}: serving\n", "")


def test_a_server_that_drains_or_is_gone_or_has_no_such_model_is_not(start) -> None:
    server = start("--models", "tiny-fp32", "--drain-delay-seconds", "600").wait_ready()
    address = f"127.0.0.1:{server.port}"
    unknown = health("--server", address, "--model", "nobody")
    assert unknown.returncode == 1
    assert "model/nobody" in unknown.stderr
    server.signal()
    with Client(address) as client:
        while client.is_serving():  # the signal takes a moment
            pass
        assert client.is_serving("liveness")
    draining = health("--server", address)
    assert (draining.returncode, draining.stdout) == (1, "readiness: not serving\n")
    server.signal()
    server.wait()
    gone = health("--server", address)
    assert gone.returncode == 1
    assert f"no server answers at {address}" in gone.stderr


async def test_the_asyncio_client_knows_health_too(server) -> None:
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        assert await client.is_serving("model/tiny-int8/1")
        with pytest.raises(AttendantError, match="nobody"):
            await client.is_serving("model/nobody")
