"""Our engine in a worker: scheduler, step graph and sampler as the server runs them, without threads or streams.

A decode step is timed from asking the scheduler to telling it what came of it. Beside it the graph alone is run on the
same rows: what a step takes longer is what the engine costs.
"""

import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_cells import capacity_for
from gpu_worker import answer, spread

from service.bundle import FoundBundle, scan
from service.engine.choosing import DeviceChooser
from service.engine.cuda_device import CudaDevice
from service.engine.device import Device, HostDevice
from service.engine.device_graph import DeviceGraph
from service.engine.device_sampler import DeviceSampler
from service.engine.engine import Engine
from service.engine.graph import Graph
from service.engine.runtime import use_threads
from service.engine.step_graph import StepGraph
from service.scheduling.config import SchedulerConfig
from service.scheduling.plan import TokenEvent
from service.scheduling.request import Request, SamplingParams
from service.scheduling.scheduler import Scheduler

STEP_TOKENS = 8192  # of prompts in a step: all rows join within a few
DEVICES: dict[str, Callable[[], Device]] = {"cuda": CudaDevice, "host": HostDevice}
POWERS = tuple(2**power for power in range(12))
TAIL = 4  # tokens of a prompt that no other shares
WARM_UP = 3


class Side:
    """One bundle on one device; `host` is the device path on the host's memory, to prove it without a GPU."""

    _graph: Graph[Any]
    _run_alone: Callable[[Sequence[int], Sequence[int]], object]

    def load(
        self, *, repository: str, name: str, provider: str, threads: int, slots: int, context: int, steps: int
    ) -> dict[str, Any]:
        """Load the bundle with slots for so many rows around a context, and return what it says of itself."""
        use_threads(threads)
        found = next(b for b in scan(Path(repository)) if isinstance(b, FoundBundle) and b.manifest.name == name)
        capacity = min(capacity_for(context, steps), found.manifest.limits.max_model_len)
        buckets: tuple[int, ...] = ()
        if provider == "cpu":
            self._graph = StepGraph(found, slots, capacity)
            self._engine = Engine(self._graph)
            self._run_alone = self._graph.decode
        else:
            buckets = (*(size for size in POWERS if size < slots), slots)
            self._open_on(DEVICES[provider](), found, capacity, buckets)
        self._config = SchedulerConfig(
            num_slots=slots,
            capacity=capacity,
            kv_budget=slots * (-(-capacity // 16) * 16),
            chunk_tokens=STEP_TOKENS,
            idle_chunk_tokens=STEP_TOKENS,
            reuses_prefixes=True,
            row_buckets=buckets,
        )
        self._vocab = self._graph.vocab_size
        return {"precision": found.manifest.precision, "sha256": found.sha256, "capacity": capacity}

    def _open_on(self, device: Device, found: FoundBundle, capacity: int, buckets: tuple[int, ...]) -> None:
        """Load the bundle on a device, with everything captured that the server captures."""
        graph = DeviceGraph(found, buckets[-1], capacity, device, buckets)
        sampler = DeviceSampler(found, graph.logits, buckets)
        graph.capture()
        sampler.capture()
        self._graph, self._engine = graph, Engine(graph, DeviceChooser(graph, sampler))

        def run_alone(token_ids: Sequence[int], lengths: Sequence[int]) -> None:
            graph.take()
            graph.decode(token_ids, lengths)
            device.synchronize()

        self._run_alone = run_alone

    def decode(self, *, rows: int, context: int, steps: int) -> dict[str, Any]:
        """Return the seconds of decode steps around a context: of the engine, and of its graph alone."""
        start = max(TAIL + 2, context - steps // 2)
        draw = random.Random(rows * context)
        scheduler = Scheduler(self._config)
        shared = self._tokens(draw, start - TAIL)
        most = self._config.capacity - start
        prompts = [(*shared, *self._tokens(draw, TAIL)) for _ in range(rows)]
        scheduler.add(_request("0", prompts[0], most))
        while not self._step(scheduler)[1]:  # until it has a token: the others begin with a copy of its prompt
            pass
        for index, prompt in enumerate(prompts[1:], 1):
            scheduler.add(_request(str(index), prompt, most))
        joined = 0  # steps that all rows were in
        while joined < WARM_UP:
            joined += self._step(scheduler)[1] == rows
        seconds = []
        for _ in range(steps):
            step, tokens = self._step(scheduler)
            assert tokens == rows, f"{tokens} of {rows} rows went on: the capacity is too small"
            seconds.append(step)
        return {"step": spread(seconds), "graph": spread(self._graph_alone(rows, start, steps))}

    def prefill(self, *, tokens: int) -> dict[str, Any]:
        """Return the seconds from a prompt to its first token."""
        draw = random.Random(tokens)
        scheduler = Scheduler(self._config)
        started = time.perf_counter()
        scheduler.add(_request("0", self._tokens(draw, tokens), 1))
        while scheduler.has_work:
            self._step(scheduler)
        return {"first_token": time.perf_counter() - started}

    def _step(self, scheduler: Scheduler) -> tuple[float, int]:
        """Return how long a step took, and how many tokens came of it."""
        started = time.perf_counter()
        plan = scheduler.schedule(started)
        result = self._engine.execute(plan)
        events = scheduler.update(plan, result, time.perf_counter())
        seconds = time.perf_counter() - started
        assert all(isinstance(event, TokenEvent) for event in events), events
        return seconds, len(events)

    def _graph_alone(self, rows: int, start: int, steps: int) -> list[float]:
        tokens, seconds = [1] * rows, []
        for step in range(steps):
            started = time.perf_counter()
            self._run_alone(tokens, [start + step + 1] * rows)
            seconds.append(time.perf_counter() - started)
        return seconds

    def _tokens(self, draw: random.Random, count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, self._vocab) for _ in range(count))


def _request(name: str, prompt: tuple[int, ...], max_tokens: int) -> Request:
    sampling = SamplingParams(temperature=0.0)
    return Request(
        request_id=name, prompt=prompt, max_tokens=max_tokens, sampling=sampling, arrival=time.perf_counter()
    )


if __name__ == "__main__":
    side = Side()
    answer({"load": side.load, "decode": side.decode, "prefill": side.prefill})
