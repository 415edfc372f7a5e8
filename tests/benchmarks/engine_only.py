"""How fast the engine is without a server: its graphs bare, and whole request sets through scheduler and engine."""

import time
from pathlib import Path

import numpy as np
from workloads import VOCAB, Workload

from service.bundle import FoundBundle, scan
from service.engine.engine import Engine
from service.engine.pools import pool_size
from service.engine.runtime import use_threads
from service.engine.step_graph import StepGraph
from service.scheduling.config import SchedulerConfig
from service.scheduling.plan import TokenEvent
from service.scheduling.request import Request, SamplingParams
from service.scheduling.scheduler import Scheduler

NUM_SLOTS = 32
KV_MEMORY = 6 << 30


class BareEngine:
    """One bundle, loaded as the server loads it, without threads, streams or metrics."""

    def __init__(self, repository: Path, name: str, threads: int) -> None:
        use_threads(threads)
        found = next(b for b in scan(repository) if isinstance(b, FoundBundle) and b.manifest.name == name)
        self.size = pool_size(found.manifest, NUM_SLOTS, KV_MEMORY)
        self.graph = StepGraph(found, NUM_SLOTS, self.size.capacity)

    def decode_rate(self, num_rows: int, context: int, steps: int = 24) -> float:
        """Return tokens a second of `steps` decode steps that start at `context` tokens."""
        rng = np.random.default_rng(0)
        for slot in range(num_rows):
            self.graph.chunk(slot, rng.integers(3, VOCAB, context).tolist(), 0)
        tokens = rng.integers(3, VOCAB, num_rows).tolist()
        started = time.perf_counter()
        for step in range(steps):
            tokens = self.graph.decode(tokens, [context + step + 1] * num_rows).argmax(axis=1).tolist()
        return num_rows * steps / (time.perf_counter() - started)

    def prefill_rate(self, num_tokens: int) -> float:
        """Return tokens a second of one prompt, prefilled in one pass."""
        prompt = np.random.default_rng(1).integers(3, VOCAB, num_tokens).tolist()
        started = time.perf_counter()
        self.graph.chunk(0, prompt, 0)
        return num_tokens / (time.perf_counter() - started)

    def run(self, workload: Workload) -> float:
        """Return generated tokens a second over the whole workload, prefill included."""
        scheduler = Scheduler(
            SchedulerConfig(num_slots=NUM_SLOTS, capacity=self.size.capacity, kv_budget=self.size.budget)
        )
        engine = Engine(self.graph)
        waiting = [
            Request(
                request_id=str(index),
                prompt=prompt,
                max_tokens=workload.output_tokens,
                sampling=SamplingParams(temperature=workload.temperature, top_p=workload.top_p, seed=index),
                arrival=0.0,
            )
            for index, prompt in enumerate(workload.prompts())
        ]
        started = time.perf_counter()
        for _ in range(workload.streams):
            scheduler.add(waiting.pop(0))
        generated = 0
        while scheduler.has_work:
            plan = scheduler.schedule(time.perf_counter())
            for event in scheduler.update(plan, engine.execute(plan), time.perf_counter()):
                assert isinstance(event, TokenEvent), event
                generated += 1
                if event.finish is not None and waiting:
                    scheduler.add(waiting.pop(0))
        assert generated == workload.generated_tokens, (generated, workload)
        return generated / (time.perf_counter() - started)
