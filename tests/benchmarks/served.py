"""A real server in a process of its own, and what it says of itself."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is ready."""

    address: str
    metrics_port: int
    pid: int

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of all samples of a metric that have these labels.

        Raises:
            LookupError: there are none.
        """
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        samples = [sample for family in families for sample in family.samples]
        found = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
        if not found:
            raise LookupError(f"the server has no metric {name} with {labels}")
        return sum(found)

    def resident_bytes(self) -> int:
        """Return the memory that the process holds."""
        lines = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def free_port() -> int:
    """Return a port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serve(repository: Path, names: Sequence[str], threads: int, flags: Sequence[str] = ()) -> Iterator[Served]:
    """Run `python -m service` with further flags and yield it once it is ready."""
    port, metrics_port = free_port(), free_port()
    command = [sys.executable, "-m", "service", "--repository", str(repository), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--metrics-port", str(metrics_port), "--threads", str(threads)]
    command += ["--models", ",".join(names), "--log-level", "warning", *flags]
    process = subprocess.Popen(command)
    try:
        address = f"127.0.0.1:{port}"
        with grpc.insecure_channel(address) as channel:
            _wait_until_ready(channel, process)
        yield Served(address, metrics_port, process.pid)
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_ready(channel: grpc.Channel, process: "subprocess.Popen[bytes]") -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    health = health_pb2_grpc.HealthStub(channel)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server left with {process.returncode}")
        with contextlib.suppress(grpc.RpcError):
            request = health_pb2.HealthCheckRequest(service="readiness")
            if health.Check(request, wait_for_ready=True, timeout=2).status == health_pb2.HealthCheckResponse.SERVING:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the server was not ready after {START_SECONDS} s")


def run_python(script: Path, job: object) -> object:
    """Run a script in a process of its own: it reads a job from standard input and prints its answer, both JSON."""
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)
