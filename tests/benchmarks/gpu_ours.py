"""Our engine in a worker: scheduler, step graph and sampler as the server runs them, without threads or streams.

A decode step is timed whole: from what is still to be planned to what came of it. Beside it the graph alone is run on
the same rows: what a step takes longer is what the engine costs.
"""

import math
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_cells import capacity_for
from gpu_worker import answer, spread

from attendant.bundle import StateSpec
from service.bundle import FoundBundle, scan
from service.engine.assembly import assemble
from service.engine.device import HostDevice, item_bytes
from service.engine.device_graph import DeviceGraph
from service.engine.engine import Engine
from service.engine.runtime import use_threads
from service.pipeline import Pipeline
from service.scheduling.config import SchedulerConfig
from service.scheduling.plan import TokenEvent
from service.scheduling.request import Request, SamplingParams
from service.scheduling.scheduler import Scheduler
from service.scheduling.slots import rounded

STEP_TOKENS = 8192  # of prompts in a step: all rows join within a few
TAIL = 4  # tokens of a prompt that no other shares
WARM_UP = 3
EAGER = "GPU_EAGER"  # an environment variable: launch every kernel alone, should CUDA graphs fail


class Side:
    """One bundle on one device; `host` is the device path on the host's memory, to prove it without a GPU."""

    def load(
        self, *, repository: str, name: str, provider: str, threads: int, slots: int, context: int, steps: int
    ) -> dict[str, Any]:
        """Load the bundle with slots for so many rows around a context, and return what it says of itself."""
        use_threads(threads)
        found = next(b for b in scan(Path(repository)) if isinstance(b, FoundBundle) and b.manifest.name == name)
        capacity = min(capacity_for(context, steps), found.manifest.limits.max_model_len)
        kept = sum(item_bytes(state.dtype) * math.prod(_sizes(state)) for state in found.manifest.states)
        assembly = assemble(
            _shortened(found, capacity),
            max_slots=slots,
            kv_memory=slots * kept * rounded(capacity),
            device=HostDevice() if provider == "host" else None,
            captures=EAGER not in os.environ,
        )
        assert assembly.num_slots == slots, (assembly.num_slots, slots)
        self._graph, self._engine = assembly.graph, Engine(assembly.graph, assembly.chooser)
        self._engine.prepare()
        self._config = SchedulerConfig(
            num_slots=slots,
            capacity=assembly.size.capacity,
            kv_budget=assembly.size.budget,
            chunk_tokens=STEP_TOKENS,
            idle_chunk_tokens=STEP_TOKENS,
            reuses_prefixes=True,
            row_buckets=assembly.row_buckets,
        )
        self._vocab = self._graph.vocab_size
        return {"precision": found.manifest.precision, "sha256": found.sha256, "capacity": capacity}

    def decode(self, *, rows: int, context: int, steps: int) -> dict[str, Any]:
        """Return the seconds of decode steps around a context: of the engine, and of its graph alone."""
        start = max(TAIL + 2, context - steps // 2)
        draw = random.Random(rows * context)
        scheduler = Scheduler(self._config)
        pipeline = Pipeline(scheduler, self._engine, time.perf_counter)
        shared = self._tokens(draw, start - TAIL)
        most = self._config.capacity - start
        prompts = [(*shared, *self._tokens(draw, TAIL)) for _ in range(rows)]
        scheduler.add(_request("0", prompts[0], most))
        while not self._step(pipeline)[1]:  # until it has a token: the others begin with a copy of its prompt
            pass
        for index, prompt in enumerate(prompts[1:], 1):
            scheduler.add(_request(str(index), prompt, most))
        joined = 0  # steps that all rows were in
        while joined < WARM_UP:
            joined += self._step(pipeline)[1] == rows
        seconds = []
        for _ in range(steps):
            step, tokens = self._step(pipeline)
            assert tokens == rows, f"{tokens} of {rows} rows went on: the capacity is too small"
            seconds.append(step)
        return {"step": spread(seconds), "graph": spread(self._graph_alone(rows, start, steps))}

    def prefill(self, *, tokens: int) -> dict[str, Any]:
        """Return the seconds from a prompt to its first token."""
        draw = random.Random(tokens)
        scheduler = Scheduler(self._config)
        pipeline = Pipeline(scheduler, self._engine, time.perf_counter)
        started = time.perf_counter()
        scheduler.add(_request("0", self._tokens(draw, tokens), 1))
        while pipeline.has_work:
            self._step(pipeline)
        return {"first_token": time.perf_counter() - started}

    @staticmethod
    def _step(pipeline: Pipeline) -> tuple[float, int]:
        """Return how long a step took, and how many tokens came of it."""
        started = time.perf_counter()
        events = pipeline.step().events
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

    def _run_alone(self, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        """Run the graph on so many rows, and wait for it."""
        if isinstance(self._graph, DeviceGraph):
            self._graph.take()
            self._graph.decode(tokens, lengths)
            self._graph.device.synchronize()
        else:
            self._graph.decode(tokens, lengths)

    def _tokens(self, draw: random.Random, count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, self._vocab) for _ in range(count))


def _sizes(state: StateSpec) -> list[int]:
    return [axis for axis in state.axes if isinstance(axis, int)]


def _shortened(found: FoundBundle, capacity: int) -> FoundBundle:
    """Return the bundle as if exported for shorter sequences: on a device a slot has memory for all of it."""
    limits = found.manifest.limits.model_copy(update={"max_model_len": capacity})
    return replace(found, manifest=found.manifest.model_copy(update={"limits": limits}))


def _request(name: str, prompt: tuple[int, ...], max_tokens: int) -> Request:
    sampling = SamplingParams(temperature=0.0)
    return Request(
        request_id=name, prompt=prompt, max_tokens=max_tokens, sampling=sampling, arrival=time.perf_counter()
    )


if __name__ == "__main__":
    side = Side()
    answer({"load": side.load, "decode": side.decode, "prefill": side.prefill})
