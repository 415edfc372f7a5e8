"""One suite for the CPU and for CUDA: the same tests on the same decoder, held to what each kind of bundle promises.

A test that takes `served` runs for fp16 and bf16 on CUDA; and, so that the tests themselves are proved, for fp32 on the
CPU and for fp16 on the host's memory (`serve_on_host.py`), where all is CUDA's but the kernels. Without a CUDA device
what is for CUDA is skipped and the last lines of the run say so; with a device but the CPU build of ONNX Runtime it
fails. The oracle is the PyTorch decoder in float32, with the weights of the bundle.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import onnxruntime
import pytest

from attendant.v1 import generation_pb2 as pb
from service.bundle import FoundBundle, scan
from service.engine.device_identity import cuda_device
from tests.end_to_end.conftest import Server, eventually, refusal_of

__all__ = ["eventually", "refusal_of"]  # fixtures

TARGETS = ["cpu-fp32", "host-fp16", *(pytest.param(f"cuda-{half}", marks=pytest.mark.gpu) for half in ("fp16", "bf16"))]
SERVE_ON_HOST = Path(__file__).with_name("serve_on_host.py")
NEED_GPU = pytest.StashKey[set[str]]()
EAGER = "GPU_EAGER"  # an environment variable: launch every kernel alone, should CUDA graphs fail
PATIENCE = 300.0  # seconds until bundles are served: a device's libraries and graphs take their time


@pytest.fixture(scope="session")
def cuda() -> str:
    """The name of the CUDA device; skips where there is none, fails where only ONNX Runtime lacks."""
    try:
        name, _ = cuda_device()
    except OSError as error:
        pytest.skip(f"no CUDA device: {error}")
    providers = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in providers:
        pytest.fail(
            f"{name} is here, but the onnxruntime that is imported from {Path(onnxruntime.__file__).parent} is the CPU "
            f"build, with {', '.join(providers)}: install the extra `gpu` instead of `cpu` (docs/gpu.md)"
        )
    return name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note which tests are for a GPU."""
    config.stash[NEED_GPU] = {item.nodeid for item in items if item.get_closest_marker("gpu")}


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Say so if tests for a GPU were asked for and none ran."""
    needing = config.stash.get(NEED_GPU, set())
    reports = terminalreporter.stats
    ran = {each.nodeid for kind in ("passed", "failed", "error") for each in reports.get(kind, ())}
    skipped = [each for each in reports.get("skipped", ()) if each.nodeid in needing]
    if skipped and not ran & needing:
        reasons = {str(each.longrepr[2]).removeprefix("Skipped: ") for each in skipped}
        terminalreporter.section("NOTHING WAS TESTED ON A GPU", red=True, bold=True)
        terminalreporter.line(f"{len(skipped)} tests were skipped: {'; '.join(sorted(reasons))}")


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer and what was said of it."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Served:
    """A trained decoder behind a real server, and what it is to be compared with.

    Args:
        server: serves it as `model`.
        found: the bundle.
        decoder: in float32, with the weights of the bundle.
        text: tokens of real text.
        on_gpu: whether a GPU computes.
    """

    def __init__(self, server: Server, found: FoundBundle, decoder, text: Sequence[int], *, on_gpu: bool) -> None:
        self.server = server
        self.found = found
        self.model = found.manifest.key
        self.decoder = decoder
        self.text = text
        self.target = found.manifest.target
        self.is_exact = self.target == "cpu"
        self.on_gpu = on_gpu

    def logits(self, token_ids: Sequence[int]):
        """Return what the oracle makes of every position, [T, V], and how far a logit of each may be off, [T, 1]."""
        import torch

        with torch.inference_mode():
            logits = self.decoder(torch.tensor([token_ids]))[0].double()
        return logits, self.found.manifest.golden.bound * logits.abs().amax(1, keepdim=True)

    def ask(self, prompt: Sequence[int], max_tokens: int, **sampling: object) -> grpc.Future:
        """Ask for exactly so many tokens, greedily unless told otherwise, with log-probabilities."""
        return self.server.generate(
            self.model,
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(max_tokens=max_tokens, **({"temperature": 0} | sampling)),
            stop=pb.StopConditions(ignore_eos=True),
            output=pb.OutputOptions(logprobs=True, top_logprobs=3),
        )

    @staticmethod
    def read(call: grpc.Future) -> tuple[list[Token], pb.Usage]:
        """Read an answer to its end."""
        events = list(call)
        tokens = [
            Token(each.token_id, each.logprob, tuple((other.token_id, other.logprob) for other in each.top))
            for event in events
            for each in event.delta.logprobs
        ]
        return tokens, events[-1].finished.usage

    def value(self, sample: str, **labels: str) -> float:
        """Return a metric of this model."""
        return self.server.value(f"attendant_{sample}", model=self.model, **labels)

    def is_idle(self) -> bool:
        """Whether nothing waits, runs or holds memory for keys and values."""
        return self.server.is_idle(model=self.model)

    @property
    def memory_bytes(self) -> float:
        """What the server holds: of the device's memory, or of the machine's if it runs on the CPU."""
        if self.on_gpu:
            return self.server.value("attendant_gpu_memory_used_bytes")
        return self.server.resident_bytes


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory):
    """Export the trained language model in a precision, once; returns the bundle and the oracle."""
    from export.bundle import Target, export_bundle
    from export.half import HALF_TYPES, first_layers, half_decoder
    from models import checkpoint

    made = {}

    def export(precision: str) -> tuple[FoundBundle, object]:
        if precision not in made:
            model = checkpoint.load(Path(__file__).parents[2] / "models" / "checkpoints" / "lm")
            repository = tmp_path_factory.mktemp(precision)
            target = Target(repository=repository, name=f"lm-{precision}", version=1)
            export_bundle(model, target, precision=precision, report=lambda line: None)
            decoder = model.module.eval()
            if precision in HALF_TYPES:
                decoder = first_layers(half_decoder(decoder, precision), decoder.config.num_layers)
            (found,) = scan(repository)
            made[precision] = found, decoder
        return made[precision]

    return export


@pytest.fixture(scope="session", params=TARGETS)
def served(request: pytest.FixtureRequest, exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The trained language model, served on the CPU or on CUDA; tests share it and leave it idle."""
    from export.text import QUALITY, tokens_of

    place, precision = request.param.split("-")
    if place == "cuda":
        request.getfixturevalue("cuda")
    found, decoder = exported(precision)
    arguments = ("--provider", found.manifest.target, "--max-num-seqs", "16")
    if EAGER in os.environ and place != "cpu":
        arguments += ("--no-cuda-graphs",)
    program = (str(SERVE_ON_HOST),) if place == "host" else ("-m", "service")
    server = Server(found.directory.parents[1], tmp_path_factory.mktemp("server") / "log", arguments, program)
    text = tokens_of(QUALITY, (found.directory / "tokenizer.json").read_text("utf-8")).tolist()
    yield Served(server.wait_ready(PATIENCE), found, decoder, text, on_gpu=place == "cuda")
    server.close()
