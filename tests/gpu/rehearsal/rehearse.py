"""A rehearsal without a GPU: ONNX Runtime's GPU build, and all of ours, on a stand-in for NVIDIA's libraries.

    make gpu-rehearsal

Kernels do nothing and numbers mean nothing, so nothing is computed. What is proved: that the GPU build loads the graphs
of a bundle for CUDA as a whole, that it captures every run of ours without allocating, waiting or copying from the host
meanwhile, that a decode step is one replay of the graph and one of the sampler, and how often a step calls the device.
How long a step takes is what host and ONNX Runtime need for it, without NVIDIA's driver and without the device.

The first time it fetches the GPU build (250 MB); a C compiler and `nm` must be there. Status 1: something is otherwise.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
STAND_IN = Path(__file__).with_name("stand_in.c")
LENGTH = 256  # tokens of the longest sequence
COUNTERS = (
    *("launches", "graph launches", "captures", "uploads", "downloads", "copies", "waits", "allocations"),
    "forbidden",
)
"""In the order of the stand-in's enum."""

LIBRARIES = {
    "libcudart.so.13": "CUDART",
    "libcublas.so.13": "CUBLAS",
    "libcublasLt.so.13": "CUBLASLT",
    "libcurand.so.10": "CURAND",
    "libcuda.so.1": "CUDA",
    "libcudnn.so.9": "CUDNN",
}
"""By the name that the provider asks for: what its part of the stand-in is called."""


def main(argv: Sequence[str] | None = None) -> int:
    """Make what is needed, rehearse in a process that finds it, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the GPU build, stand-in and a bundle are kept")
    parser.add_argument("--rows", type=int, default=8, help="of a decode step (default: %(default)s)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    out = given.out.resolve()
    site, libraries, repository = out / "site", out / "libraries", out / "bundles"
    if given.inside:
        return rehearse(repository, given.rows)
    if not (site / "onnxruntime").is_dir():
        (wanted,) = re.findall(r'"(onnxruntime-gpu==[^"]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), wanted]
        subprocess.run(pip, check=True)
    stand_in(site / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so", libraries)
    if not repository.is_dir():
        asked = ("--synthetic", "llama-tiny", "--name", "llama-tiny", "--precision", "bf16")
        command = [sys.executable, "-m", "export", str(repository), *asked, "--max-model-len", str(LENGTH)]
        subprocess.run(command, cwd=ROOT, check=True)
    paths = [str(site), str(ROOT), str(ROOT / "proto"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LD_LIBRARY_PATH": str(libraries)}
    command = [sys.executable, __file__, "--out", str(out), "--rows", str(given.rows), "--inside"]
    return subprocess.run(command, env=environment, check=False).returncode


def stand_in(provider: Path, libraries: Path) -> None:
    """Compile a library for each that the provider needs, with every function that it asks for."""
    names = asked_for(provider)
    libraries.mkdir(parents=True, exist_ok=True)
    for library, part in LIBRARIES.items():
        rest = libraries / f"{part}.c"
        rest.write_text("\n".join(["#include <stdlib.h>", *map(_empty, sorted(names[library]))]) + "\n", "utf-8")
        versions = libraries / f"{part}.map"
        versions.write_text(f"{library} {{ global: *; }};\n", "utf-8")
        command = ["cc", "-shared", "-fPIC", "-w", f"-D{part}", f"-Wl,--version-script={versions}"]
        subprocess.run(
            [*command, f"-Wl,-soname,{library}", str(STAND_IN), str(rest), "-o", str(libraries / library)], check=True
        )


def asked_for(provider: Path) -> dict[str, set[str]]:
    """Return the functions that the provider calls, by library; cuDNN's are looked up while it runs."""
    names = defaultdict(set)
    command = ["nm", "-D", "--undefined-only", str(provider)]
    listed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    for name, library in re.findall(r" U (\w+)(?:@(\S+))?", listed):
        if library or re.match("cu[A-Z]", name):
            names[library or "libcuda.so.1"].add(name)
    looked_up = re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", provider.read_bytes())
    names["libcudnn.so.9"].update(name.decode() for name in looked_up)
    return names


def _empty(name: str) -> str:
    """Return a function that succeeds, weak: what the stand-in has of its own goes before."""
    if "String" in name or "StatusName" in name:
        return f'__attribute__((weak)) const char *{name}(int status) {{ return "an error"; }}'
    if re.search(r"Create(_v2)?$|Create\w*Descriptor$", name):
        return f"__attribute__((weak)) int {name}(void **made) {{ *made = calloc(1, 256); return 0; }}"
    return f"__attribute__((weak)) int {name}(void) {{ return 0; }}"


class Calls:
    """Counts what the device was called for."""

    def __init__(self) -> None:
        from service.engine.cuda_device import cuda_runtime

        self._take = cuda_runtime()._library.stand_in_take
        self.faults: list[str] = []
        print(f"{'calls':32}", *COUNTERS, sep=" | ")

    def of(self, what: str, **expected: int) -> None:
        """Print what was called since this was last asked, and note what is not as expected."""
        counts = {name: self._take(number) for number, name in enumerate(COUNTERS)}
        print(f"{what:32}", *(f"{counts[name]:>{len(name)}}" for name in COUNTERS), sep=" | ")
        for field, number in {"forbidden": 0, **expected}.items():
            name = field.replace("_", " ")
            if counts[name] != number:
                self.faults.append(f"{what}: {counts[name]} {name}, must be {number}")


def rehearse(repository: Path, num_rows: int) -> int:
    """Load, capture, decode; return 1 if the device was called otherwise than it must be."""
    import onnxruntime

    from service.bundle import scan
    from service.engine.device_graph import DeviceGraph
    from service.engine.runtime import use_threads
    from service.scheduling.config import SchedulerConfig
    from service.scheduling.request import SamplingParams
    from service.scheduling.row_buckets import row_buckets

    onnxruntime.set_default_logger_severity(3)
    use_threads(2)
    DeviceGraph._verify = lambda *_: None  # there are no numbers to compare
    calls, (found,) = Calls(), scan(repository)
    engine = load(found, num_rows)
    calls.of("load", captures=0)
    engine.prepare()
    buckets = row_buckets(num_rows)
    num_captures = len(buckets) + 2 * len(row_buckets(2 * num_rows))
    calls.of("capture", captures=num_captures)
    config = SchedulerConfig(
        num_slots=num_rows, capacity=LENGTH, kv_budget=num_rows * LENGTH, reuses_prefixes=True, row_buckets=buckets
    )
    for name, sampling in {
        "greedy": SamplingParams(temperature=0.0),
        "drawn": SamplingParams(temperature=0.8, seed=1),
        "drawn with top-p": SamplingParams(temperature=0.8, top_p=0.95, seed=1),
    }.items():
        decode(name, sampling, engine, config, calls)
    another = threading.Thread(target=lambda: load(found, num_rows).prepare())
    another.start()
    while another.is_alive():
        for _ in busy(engine, config, SamplingParams(temperature=0.0)):
            pass
    calls.of("another is loaded beside it", captures=num_captures)
    for fault in calls.faults:
        print(f"error: {fault}", file=sys.stderr)
    return int(bool(calls.faults))


def load(found: Any, num_rows: int) -> Any:
    """Load a bundle as the service does, but for checks of numbers."""
    from service.engine.choosing import DeviceChooser
    from service.engine.cuda_device import CudaDevice
    from service.engine.device_graph import DeviceGraph
    from service.engine.device_sampler import DeviceSampler
    from service.engine.engine import Engine
    from service.scheduling.row_buckets import row_buckets

    device = CudaDevice()
    with device.loading, device.turns.together():
        graph = DeviceGraph(found, num_rows, LENGTH, device, row_buckets(num_rows))
        sampler = DeviceSampler(found, graph.logits, row_buckets(graph.logits.shape[0]))
    return Engine(graph, DeviceChooser(graph, sampler))


def busy(engine: Any, config: Any, sampling: Any) -> Iterator[tuple[Any, float]]:
    """Let a request of every slot run to its end, and yield every step that all decode in, and its seconds."""
    from service.pipeline import Pipeline
    from service.scheduling.request import Request
    from service.scheduling.scheduler import Scheduler

    num_rows, scheduler = config.num_slots, Scheduler(config)
    pipeline = Pipeline(scheduler, engine, lambda: 0.0)
    for number in range(num_rows):
        prompt = tuple(range(3 + number, 23 + number + number % 9))
        scheduler.add(Request(request_id=f"{number}", prompt=prompt, max_tokens=150, sampling=sampling, arrival=0.0))
    while pipeline.has_work:
        started = time.perf_counter()
        step = pipeline.step()
        if len(step.plan.rows) == len(step.events) == num_rows:
            yield step, time.perf_counter() - started


def decode(name: str, sampling: Any, engine: Any, config: Any, calls: Calls) -> None:
    """Count the calls of prompts, of a first step, of one like all others, and of the rest."""
    steps = busy(engine, config, sampling)
    next(steps)
    calls.of(f"{name}: to the first step", captures=0)
    next(steps)
    uploads = 2 if sampling.is_greedy else 3  # tokens, lengths, and what was drawn
    replayed = {"graph_launches": 2, "launches": 0, "captures": 0, "uploads": uploads, "downloads": 1}
    calls.of(f"{name}: a step", **replayed, waits=1, allocations=0)
    seconds = [taken for _, taken in steps]
    assert len(seconds) > 100, "nobody ended early"
    median, best = (1e6 * each for each in (statistics.median(seconds), min(seconds)))
    print(f"{name}: {median:.0f} ({best:.0f}) us a step of {config.num_slots} rows")
    calls.of(f"{name}: the rest", captures=0)


if __name__ == "__main__":
    sys.exit(main())
