"""Real servers in processes of their own, called over sockets."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from attendant.v1 import generation_pb2 as pb
from attendant.v1 import inference_service_pb2_grpc, model_service_pb2_grpc

PATIENCE = 60.0  # seconds after which something that should have happened has not


class Server:
    """`python -m service`, or another program that serves, on free ports, with a channel to it."""

    def __init__(
        self, repository: Path, log: Path, arguments: tuple[str, ...], program: tuple[str, ...] = ("-m", "service")
    ) -> None:
        command = [sys.executable, *program, "--repository", str(repository), "--host", "127.0.0.1"]
        command += ["--port", "0", "--metrics-port", "0", "--kv-memory", "64MiB", *arguments]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ATTENDANT_")}
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True, env=environment)
        self.lines: list[str] = []
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._listening.wait(PATIENCE)
        ports = re.search(r"gRPC on port (\d+), metrics on port (\d+)", "".join(self.lines[:1]))
        if ports is None:
            self.close()
            pytest.fail(f"the server did not start: {self.lines} {log.read_text()}")
        self.port, self.metrics_port = int(ports[1]), int(ports[2])
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.inference = inference_service_pb2_grpc.InferenceServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self._listening.set()
        self._listening.set()

    def wait_ready(self, patience: float = PATIENCE) -> "Server":
        watch = self.health.Watch(health_pb2.HealthCheckRequest(service="readiness"), timeout=patience)
        for update in watch:
            if update.status == health_pb2.HealthCheckResponse.SERVING:
                break
        watch.cancel()
        return self

    def status_of(self, name: str) -> str:
        response = self.health.Check(health_pb2.HealthCheckRequest(service=name), timeout=PATIENCE)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

    def generate(self, model: str = "tiny-fp32", timeout: float = PATIENCE, **fields: object) -> grpc.Future:
        if not {"prompt", "messages", "token_ids"} & set(fields):
            fields["prompt"] = "Once upon a time"
        return self.inference.Generate(pb.GenerateRequest(model=model, **fields), timeout=timeout)

    def long_answer(self, num_tokens: int = 250, model: str = "tiny-fp32", **fields: object) -> grpc.Future:
        """Ask for exactly so many tokens."""
        sampling = pb.SamplingParams(max_tokens=num_tokens, seed=1)
        return self.generate(model, sampling=sampling, stop=pb.StopConditions(ignore_eos=True), **fields)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}{path}", timeout=PATIENCE) as response:
            return str(response.read().decode())

    def families(self) -> Iterator[Metric]:
        """Scrape once."""
        return text_string_to_metric_families(self.get("/metrics"))

    def value(self, sample: str, **labels: str) -> float:
        """Return the sum of the samples of this name with these labels; 0 without any."""
        return sum(
            found.value
            for family in self.families()
            for found in family.samples
            if found.name == sample and labels.items() <= found.labels.items()
        )

    def is_idle(self, **labels: str) -> bool:
        """Whether nothing waits, runs or holds memory for keys and values; a replay of the canary does hold some."""
        names = ("attendant_requests_waiting", "attendant_requests_running", "attendant_kv_cache_usage_ratio")
        samples = [found for family in self.families() for found in family.samples if found.name in names]
        return not any(found.value for found in samples if labels.items() <= found.labels.items())

    @property
    def resident_bytes(self) -> int:
        """Memory that the process holds in RAM."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the process and return its exit status."""
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if hasattr(self, "channel"):
            self.channel.close()
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


Start = Callable[..., Server]


@pytest.fixture
def start(tiny_repository: Path, tmp_path: Path) -> Iterator[Start]:
    """Start servers of the test's own."""
    with contextlib.ExitStack() as stack:

        def start_one(*arguments: str, repository: Path = tiny_repository) -> Server:
            server = Server(repository, tmp_path / f"{len(list(tmp_path.iterdir()))}.log", arguments)
            stack.callback(server.close)
            return server

        yield start_one


@pytest.fixture(scope="module")
def module_start(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start servers that the tests of a module share."""
    with contextlib.ExitStack() as stack:

        def start_one(*arguments: str, repository: Path = tiny_repository) -> Server:
            server = Server(repository, tmp_path_factory.mktemp("server") / "log", arguments)
            stack.callback(server.close)
            return server

        yield start_one


@pytest.fixture(scope="session")
def server(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of both tiny bundles that tests share, none of which disturbs the others."""
    server = Server(tiny_repository, tmp_path_factory.mktemp("server") / "log", ())
    yield server.wait_ready()
    server.close()


class Refusal:
    """What a failed call says."""

    def __init__(self, error: grpc.RpcError) -> None:
        self.code = error.code()
        self.message = error.details()
        self.reason, self.metadata, self.field, self.retry_seconds = "", {}, "", None
        status = rpc_status.from_call(error)
        for detail in status.details if status is not None else ():
            info, bad, retry = (
                error_details_pb2.ErrorInfo(),
                error_details_pb2.BadRequest(),
                error_details_pb2.RetryInfo(),
            )
            if detail.Unpack(info):
                self.reason, self.metadata, self.domain = info.reason, dict(info.metadata), info.domain
            elif detail.Unpack(bad):
                self.field = bad.field_violations[0].field
            elif detail.Unpack(retry):
                self.retry_seconds = retry.retry_delay.ToMilliseconds() / 1000


@pytest.fixture(scope="session")
def refusal_of() -> Callable[[Callable[[], object]], Refusal]:
    """Run something that must fail and return what it says."""

    def refusal_of(call: Callable[[], object]) -> Refusal:
        with pytest.raises(grpc.RpcError) as error:
            call()
        return Refusal(error.value)

    return refusal_of


@pytest.fixture(scope="session")
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Ask until something holds: for effects that follow a call's end."""

    def eventually(holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, "it never came to hold"

    return eventually
