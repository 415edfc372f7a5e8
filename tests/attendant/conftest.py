"""A real gRPC server on a real socket whose answers a test writes, and the command as a person runs it."""

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from attendant.v1 import (
    classification_pb2,
    embedding_pb2,
    fill_mask_pb2,
    generation_pb2,
    inference_service_pb2,
    model_service_pb2,
    scoring_pb2,
    tagging_pb2,
)
from attendant.v1.inference_service_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from attendant.v1.model_service_pb2_grpc import ModelServiceServicer, add_ModelServiceServicer_to_server

PATIENCE = 20  # seconds after which something that should have happened has not
COMMAND = [sys.executable, "-m", "attendant.cli"]


def answer(*texts: str, logprobs: bool = False) -> list[generation_pb2.GenerateResponse]:
    """The events of an answer: one delta for each text, with its index as token id."""
    pb = generation_pb2
    deltas = [
        pb.Delta(
            text=text,
            token_ids=[i],
            logprobs=[pb.TokenLogprob(token_id=i, logprob=-0.5, top=[pb.TopLogprob(token_id=9, logprob=-1)])]
            if logprobs
            else [],
        )
        for i, text in enumerate(texts)
    ]
    finished = pb.Finished(
        finish_reason=pb.FINISH_REASON_EOS,
        usage=pb.Usage(prompt_tokens=3, cached_tokens=1, output_tokens=len(texts)),
        timings=pb.Timings(
            queue=Duration(nanos=1_000_000), decode=Duration(nanos=500_000_000), total=Duration(seconds=1)
        ),
    )
    return [
        pb.GenerateResponse(started=pb.Started(request_id="r1", prompt_tokens=3, seed=2**64 - 1, model="tiny/1")),
        *(pb.GenerateResponse(delta=delta) for delta in deltas),
        pb.GenerateResponse(finished=finished),
    ]


def refusal(code: grpc.StatusCode, message: str, *details: object) -> grpc.Status:
    """A status with google.rpc details, as the service sends it."""
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=packed))


class Script(InferenceServiceServicer, ModelServiceServicer):
    """Answers with what the test put here, and remembers what it was asked."""

    def __init__(self) -> None:
        self.generate: Callable[..., Iterator[generation_pb2.GenerateResponse]] = lambda request, context: iter(
            answer("Hel", "", "lo")
        )
        self.requests: list[object] = []
        self.models = [
            model_service_pb2.Model(
                name="tiny",
                version=1,
                state=model_service_pb2.MODEL_STATE_READY,
                precision="int8",
                max_model_len=64,
                tasks=["generate"],
                reads="text",
                checks=[model_service_pb2.Check(name="parity", measured=1e-6, bound=1e-4, grid="1-64")],
            )
        ]
        self.page_size = 100
        self.cancelled = threading.Event()

    def hang(self, *texts: str) -> None:
        """Answer with these texts and then wait until the client goes away."""

        def generate(request, context):
            gone = threading.Event()
            if not context.add_callback(gone.set):
                gone.set()
            try:
                yield from answer(*texts)[:-1]
                assert gone.wait(PATIENCE)
            except GeneratorExit:  # gone before it had read everything
                gone.set()
                raise
            finally:
                if gone.is_set():
                    self.cancelled.set()

        self.generate = generate

    def fail(self, status: grpc.Status, *, times: int = 1_000_000, after: int = 0) -> None:
        """Refuse that many calls, each after so many events."""

        def generate(request, context):
            if len(self.requests) <= times:
                yield from answer("Hel", "lo")[:after]
                context.abort_with_status(status)
            yield from answer("Hel", "lo")

        self.generate = generate

    def Generate(self, request, context):
        self.requests.append(request)
        yield from self.generate(request, context)

    def Embed(self, request, context):
        self.requests.append(request)
        pb = embedding_pb2
        lengths = [len(item.text) or len(item.token_ids.ids) for item in request.inputs]
        vectors = [pb.Embedding(values=[0.5, length], tokens=length, truncated=length > 2) for length in lengths]
        usage = generation_pb2.Usage(prompt_tokens=sum(lengths))
        return pb.EmbedResponse(embeddings=vectors, model="encoder/1", usage=usage)

    def Classify(self, request, context):
        self.requests.append(request)
        pb = classification_pb2
        logits = [0.5, -1.5] if request.logits else [None, None]
        scores = [
            pb.ClassScore(index=i, label=label, probability=p, logit=logit)
            for i, (label, p, logit) in enumerate(zip(("good", "bad"), (0.75, 0.25), logits, strict=True))
        ]
        return pb.ClassifyResponse(
            classifications=[pb.Classification(classes=scores, tokens=4)] * len(request.inputs), model="classes/1"
        )

    def TagTokens(self, request, context):
        self.requests.append(request)
        pb = tagging_pb2
        token = pb.TaggedToken(token_id=5, token="Ada", label="person", probability=0.5, start=0, end=3)
        tagging = pb.Tagging(tokens=[token], num_tokens=3, truncated=request.truncate)
        return pb.TagTokensResponse(taggings=[tagging] * len(request.inputs), model="tags/1")

    def FillMask(self, request, context):
        self.requests.append(request)
        pb = fill_mask_pb2
        candidate = pb.TokenCandidate(token_id=7, token="cat", probability=0.5)
        text = pb.FilledText(masks=[pb.FilledMask(position=2, candidates=[candidate])], tokens=4)
        return pb.FillMaskResponse(texts=[text] * len(request.inputs), model="gaps/1")

    def Score(self, request, context):
        self.requests.append(request)
        pb = scoring_pb2
        scores = [pb.TextScore(score=len(text), probability=0.5, tokens=9) for text in request.relevance.texts]
        order = sorted(range(len(scores)), key=lambda index: -scores[index].score)
        return pb.ScoreResponse(scores=scores, order=order, model="relevance/1")

    def Tokenize(self, request, context):
        self.requests.append(request)
        return inference_service_pb2.TokenizeResponse(token_ids=[1, 2], tokens=["a", "Ġb"], text="rendered")

    def Detokenize(self, request, context):
        self.requests.append(request)
        return inference_service_pb2.DetokenizeResponse(text="a b")

    def ListModels(self, request, context):
        begin = int(request.page_token or 0)
        end = begin + min(request.page_size, self.page_size)
        token = str(end) if end < len(self.models) else ""
        return model_service_pb2.ListModelsResponse(models=self.models[begin:end], next_page_token=token)

    def GetModel(self, request, context):
        self.requests.append(request)
        for model in self.models:
            if request.model in (model.name, f"{model.name}/{model.version}"):
                return model_service_pb2.GetModelResponse(model=model)
        info = error_details_pb2.ErrorInfo(reason="MODEL_NOT_FOUND", domain="attendant")
        context.abort_with_status(refusal(grpc.StatusCode.NOT_FOUND, f"no model {request.model!r}", info))


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let the commands under test be interrupted, even where a shell has put all of this into the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def address(script: Script) -> Iterator[str]:
    """Where the scripted server listens."""
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
        add_InferenceServiceServicer_to_server(script, server)
        add_ModelServiceServicer_to_server(script, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


@pytest.fixture(name="refusal")
def _refusal() -> Callable[..., grpc.Status]:
    return refusal


@pytest.fixture
def make_answer() -> Callable[..., list[generation_pb2.GenerateResponse]]:
    return answer


@pytest.fixture
def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# The command in a process of its own.


@pytest.fixture
def environment(address) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ATTENDANT_")}
    return kept | {"ATTENDANT_SERVER": address}


@pytest.fixture
def run(environment):
    def run(*arguments: str, stdin: str | bytes = b"") -> subprocess.CompletedProcess[str]:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            [*COMMAND, *arguments], input=data, capture_output=True, env=environment, timeout=PATIENCE, check=False
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def start(environment) -> Iterator:
    """Start the command with a pipe for its output; whatever still runs afterwards is killed."""
    running = []

    def start(*arguments: str, command=COMMAND, **pipes) -> subprocess.Popen:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | pipes
        running.append(subprocess.Popen([*command, *arguments], env=environment, **pipes))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


class Terminal:
    """Both ends of a pseudo terminal: a person types, reads, and waits for words."""

    def __init__(self) -> None:
        self.ours, self.theirs = pty.openpty()
        self.seen = ""
        self.process: subprocess.Popen | None = None  # whose terminal it is

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Read until the pattern appears after what was waited for last."""
        deadline = time.monotonic() + PATIENCE
        while (found := re.search(pattern, self.seen, re.DOTALL)) is None:
            ready, _, _ = select.select([self.ours], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                pytest.fail(f"waited for {pattern!r}, saw {self.seen!r}; the process was at {self._where()}")
            self.seen += os.read(self.ours, 4096).decode()
        self.seen = self.seen[found.end() :]
        return found[0]

    def _where(self) -> str:
        """End the process, and return what it says of where it was."""
        if self.process is None:
            return "no process"
        self.process.send_signal(signal.SIGABRT)
        said = ""
        while select.select([self.ours], [], [], 1)[0]:
            said += os.read(self.ours, 4096).decode()
        return said

    def interrupt_until(self, pattern: str) -> None:
        """Press Ctrl-C, and again each second as a person would, until the pattern appears.

        `input()` writes its prompt before it waits, and sleeps through a signal that arrives between the two.
        """
        for _ in range(PATIENCE):
            self.type("\x03")
            if select.select([self.ours], [], [], 1)[0]:
                break
        self.wait_for(pattern)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    os.close(terminal.ours)
    os.close(terminal.theirs)


OWN_TERMINAL = """
import fcntl, sys, termios
from attendant.cli import main
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.exit(main())
"""


@pytest.fixture
def on_terminal(start, terminal: Terminal) -> Callable[..., subprocess.Popen]:
    """Start the command with the terminal as its own, so that typing Ctrl-C there interrupts it."""

    def on_terminal(*arguments: str) -> subprocess.Popen:
        ends = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.theirs)
        command = [sys.executable, "-X", "faulthandler", "-c", OWN_TERMINAL]
        terminal.process = start(*arguments, command=command, start_new_session=True, **ends)
        return terminal.process

    return on_terminal
