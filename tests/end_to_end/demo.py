"""`make demo`: a server, a streamed answer, prompts of many lengths at once, latency by length, and like sentences.

Any step that fails ends the demo with a status other than 0; the server is stopped either way.
"""

import asyncio
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from attendant import AsyncClient, Client
from attendant._latency import latency_table
from attendant._terminal import visible
from attendant.telemetry import duration

MODEL = "smollm2-135m"
QUESTION = "Explain in three sentences what attention means in a neural network."
ENCODER = "all-minilm-l6-v2"
SENTENCES = ("A man is eating food.", "Someone is having a meal.", "The stock market fell sharply today.")
PROMPT_WORDS = (10, 20, 40, 80, 160, 320, 640, 1200)
REQUESTS_OF_EACH = 4
ANSWER_TOKENS = 32
START_SECONDS = 120
STOP_SECONDS = 60


class Server:
    """`python -m service` on free ports; what it says is shown with a mark before it."""

    def __init__(self, repository: Path) -> None:
        command = [sys.executable, "-m", "service", "--repository", str(repository), "--host", "127.0.0.1"]
        self._process = subprocess.Popen(
            [*command, "--port", "0", "--metrics-port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._ports: tuple[int, int] | None = None
        self._listening = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(f"    | {line}", end="", flush=True)
            if found := re.search(r"gRPC on port (\d+), metrics on port (\d+)", line):
                self._ports = int(found[1]), int(found[2])
                self._listening.set()
        self._listening.set()  # it has ended, and waiting for it is over

    def addresses(self) -> tuple[str, str]:
        """Wait until every bundle is through its checks; return where gRPC and the metrics are."""
        self._listening.wait(START_SECONDS)
        if self._ports is None:
            raise SystemExit("the server did not start")
        address = f"127.0.0.1:{self._ports[0]}"
        with grpc.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service="readiness"), timeout=START_SECONDS
            )
            for health in watch:
                if health.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        return address, f"http://127.0.0.1:{self._ports[1]}/metrics"

    def stop(self) -> int:
        """Ask the server to go and return its exit status; one that stays is killed."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_SECONDS)
        finally:
            self._process.kill()


def main(repository: Path) -> int:
    """Run the demo and return its exit status."""
    say("starting the server")
    begin = time.perf_counter()
    server = Server(repository)
    try:
        address, metrics = server.addresses()
        say(f"ready after {duration(time.perf_counter() - begin)}: gRPC at {address}")
        chat(address)
        say(f"{len(PROMPT_WORDS) * REQUESTS_OF_EACH} requests at once, prompts of {PROMPT_WORDS[0]} to "
            f"{PROMPT_WORDS[-1]} words")  # fmt: skip
        asyncio.run(load(address))
        with urllib.request.urlopen(metrics, timeout=10) as response:
            table = latency_table(response.read().decode(), model=MODEL)
        if table is None:
            raise SystemExit("the server measured nothing")
        say("latency by sequence length, as the server measured it")
        print(table)
        compare(address)
    finally:
        status = server.stop()
    if status != 0:
        raise SystemExit(f"the server left with status {status}")
    say("the server has stopped cleanly")
    return 0


def chat(address: str) -> None:
    """Stream one answer to the terminal, as it comes."""
    say(f"asking {MODEL}: {QUESTION}")
    with Client(address) as client:
        stream = client.chat([("user", QUESTION)], model=MODEL, temperature=0, max_tokens=128)
        for text in stream:
            print(visible(text), end="", flush=True)
        finished = stream.result().finished
    rate = (finished.usage.output_tokens - 1) / max(finished.timings.decode_seconds, 1e-9)
    print(f"\n({finished.usage.output_tokens} tokens, {rate:.0f} tokens/s, ended by {finished.finish_reason})")


def compare(address: str) -> None:
    """Show how alike an encoder finds some sentences."""
    say(f"asking {ENCODER} how alike sentences are")
    with Client(address) as client:
        first, *others = client.embed(SENTENCES, model=ENCODER)
    for sentence, other in zip(SENTENCES[1:], others, strict=True):
        cosine = sum(a * b for a, b in zip(first, other, strict=True))
        print(f"{cosine:6.3f}  {SENTENCES[0]!r} and {sentence!r}")


async def load(address: str) -> None:
    """Send prompts of every length at once and print what came of them together."""
    words = ["attention", "and", "memory", "of", "a", "long", "story", "about", "the", "sea"]
    begin = time.perf_counter()
    async with AsyncClient(address) as client:
        streams = [
            client.generate(
                f"{n}. " + " ".join(words[i % len(words)] for i in range(length)),
                model=MODEL,
                max_tokens=ANSWER_TOKENS,
                ignore_eos=True,
                seed=n,
            )
            for n in range(REQUESTS_OF_EACH)
            for length in PROMPT_WORDS
        ]
        answers = await asyncio.gather(*(stream.result() for stream in streams))
    seconds = time.perf_counter() - begin
    if any(answer.usage.output_tokens != ANSWER_TOKENS for answer in answers):
        raise SystemExit("an answer is not as long as was asked for")
    read = sum(answer.usage.prompt_tokens for answer in answers)
    written = sum(answer.usage.output_tokens for answer in answers)
    print(f"{read} tokens read and {written} written in {duration(seconds)}")


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
