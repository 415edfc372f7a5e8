"""What the host does in a decode step of a device: what the device waits for, and what is done while it computes.

    python tests/benchmarks/host_cost.py

The engine loop of a synthetic bundle runs as on a GPU, but with the host's memory for a device, and with nothing in the
place of the graphs' runs: what is left is what the host does. Figures are medians of many steps, in microseconds, with
the best in brackets; the garbage collector's share is in them.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from export.__main__ import main as export
from service.bundle import FoundBundle, scan
from service.engine.binding import Binding
from service.engine.device import HostDevice
from service.engine_loop import EngineLoop, EngineOptions
from service.metrics import ServerMetrics
from service.scheduling.request import Request, SamplingParams

ROWS = (1, 32, 128, 256)
ASKED = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature 0.8, top-p 0.95": SamplingParams(temperature=0.8, top_p=0.95, seed=3),
    "and repetition penalty 1.1": SamplingParams(temperature=0.8, top_p=0.95, seed=3, repetition_penalty=1.1),
}
LENGTH = ("--max-model-len", "512")
WARM_UP = 40
STEPS = 200
MEANWHILE = ("_hand_over", "advance", "schedule")


class Stopwatch:
    """Seconds spent in some methods since it was last read."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def watch(self, owner: object, name: str) -> None:
        """Time every call of a method."""
        method: Callable[..., object] = getattr(owner, name)

        def timed(*arguments: object, **named: object) -> object:
            started = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                self.seconds[name] += time.perf_counter() - started

        setattr(owner, name, timed)


def measure(found: FoundBundle, num_rows: int, sampling: SamplingParams) -> tuple[list[float], list[float]]:
    """Return of each step the seconds in which the device has nothing to do, and those that it hides."""
    options = EngineOptions(num_slots=num_rows, kv_memory=num_rows << 20)
    metrics = ServerMetrics().model(found.manifest.key, found.manifest.limits.max_model_len)
    loop = EngineLoop.load(found, options, metrics, HostDevice())
    scheduler = loop._scheduler
    loop._call_soon = lambda *_: None
    watch = Stopwatch()
    watch.watch(loop, "_hand_over")
    watch.watch(scheduler, "advance")
    watch.watch(scheduler, "schedule")
    for row in range(num_rows):
        prompt = tuple(range(5, 37))
        request = Request(
            request_id=f"r/{row}",
            prompt=prompt,
            max_tokens=loop.capacity - len(prompt),
            sampling=sampling,
            eos_token_ids=frozenset({2}),
            arrival=loop.clock(),
        )
        scheduler.add(request)
    while scheduler.occupancy().num_uncomputed:
        loop._step()
    run, Binding.run = Binding.run, lambda *_: None
    choices = loop._engine._chooser._sampler._choices  # which stay what they are
    choices.buffer.device.upload(np.full(choices.array.shape, 7, choices.array.dtype), choices.buffer)
    exposed, hidden = [], []
    for _ in range(WARM_UP + STEPS):
        watch.seconds.clear()
        started = time.perf_counter()
        loop._step()
        seconds = time.perf_counter() - started
        hidden.append(sum(watch.seconds[name] for name in MEANWHILE))
        exposed.append(seconds - hidden[-1])
    Binding.run = run
    assert scheduler.occupancy().num_running == num_rows, "nobody ended"
    return exposed[WARM_UP:], hidden[WARM_UP:]


def shown(seconds: list[float]) -> str:
    """Return microseconds: the median, and the best."""
    return f"{statistics.median(seconds) * 1e6:.0f} ({min(seconds) * 1e6:.0f})"


def main() -> None:
    """Export, measure, print."""
    parser = argparse.ArgumentParser(description="what the host does in a decode step of a device, in microseconds")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of a step (default: %(default)s)")
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as directory:
        export([directory, "--synthetic", "llama-tiny", "--name", "llama-tiny", "--precision", "fp16", *LENGTH])
        (found,) = scan(Path(directory))
        assert isinstance(found, FoundBundle), found
        print("asked for | rows | the device waits | meanwhile")
        for name, sampling in ASKED.items():
            for num_rows in rows:
                exposed, hidden = measure(found, num_rows, sampling)
                print(f"{name:28} | {num_rows:4} | {shown(exposed):>12} | {shown(hidden):>12}")


if __name__ == "__main__":
    main()
