"""The naive server: as many requests as have come, up to a fixed number, run together until all are finished.

It runs the same graphs in a process of its own: a job comes from standard input, what became of each arrival goes to
standard output. Clients hang up when an answer is of no use any more; one that waits is then left out, one that runs is
not, because nothing leaves a batch.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from engine_only import BareEngine
from workloads import VOCAB


class FixedBatches:
    """Runs a trace.

    Args:
        bare: the engine.
        arrivals: fields of each `Arrival`, in their order.
        rows: requests of a batch.
        seed: of the prompts.
    """

    def __init__(self, bare: BareEngine, arrivals: list[dict[str, Any]], rows: int, seed: int) -> None:
        self._graph = bare.graph
        self._arrivals = arrivals
        self._rows = rows
        self._seed = seed
        self.outcomes: list[dict[str, Any]] = [
            {"ending": "hung up", "ended_seconds": arrival["arrival_seconds"] + (arrival["budget_seconds"] or 0.0)}
            | {"first_token_seconds": None, "gaps": []}
            for arrival in arrivals
        ]
        self.real_tokens = self.padding_tokens = 0

    def run(self) -> None:
        """Run the trace to its end."""
        self._begin = time.perf_counter()
        waiting = list(range(len(self._arrivals)))
        while waiting:
            now = self._now()
            waiting = [index for index in waiting if now < self._due(index)]
            come = [index for index in waiting if self._arrivals[index]["arrival_seconds"] <= now][: self._rows]
            if come:
                self._batch(come)
                waiting = [index for index in waiting if index not in come]
            elif waiting:
                time.sleep(max(0.0, self._arrivals[waiting[0]]["arrival_seconds"] - now))

    def _now(self) -> float:
        return time.perf_counter() - self._begin

    def _due(self, index: int) -> float:
        budget = self._arrivals[index]["budget_seconds"]
        return float("inf") if budget is None else self._arrivals[index]["arrival_seconds"] + budget

    def _batch(self, batch: list[int]) -> None:
        draws = [random.Random(f"{self._seed}/{index}") for index in batch]
        tokens, lengths, last = [], [], []
        for slot, (index, draw) in enumerate(zip(batch, draws, strict=True)):
            prompt = [draw.randrange(3, VOCAB) for _ in range(self._arrivals[index]["prompt_tokens"])]
            self._graph.begin(slot)
            tokens.append(int(self._graph.chunk(slot, prompt, 0)[0].argmax()))
            lengths.append(len(prompt) + 1)
            self.real_tokens += len(prompt)
            last.append(self._now())
            self.outcomes[index]["first_token_seconds"] = last[-1]
            self._end_if_last(index, last[-1])
        left = [self._arrivals[index]["output_tokens"] - 1 for index in batch]
        while max(left) > 0:
            tokens = self._graph.decode(tokens, lengths).argmax(axis=1).tolist()
            now = self._now()
            for slot, index in enumerate(batch):
                if left[slot] <= 0:
                    self.padding_tokens += 1
                    continue
                self.real_tokens += 1
                left[slot] -= 1
                lengths[slot] += 1
                self.outcomes[index]["gaps"].append(now - last[slot])
                last[slot] = now
                self._end_if_last(index, now)

    def _end_if_last(self, index: int, now: float) -> None:
        outcome = self.outcomes[index]
        if len(outcome["gaps"]) + 1 == self._arrivals[index]["output_tokens"]:
            outcome["ending"] = "finished" if now <= self._due(index) else "hung up"
            outcome["ended_seconds"] = min(now, self._due(index))


def main() -> None:
    """Read a job, run it, print what became of it."""
    job = json.load(sys.stdin)
    bare = BareEngine(Path(job["repository"]), job["model"], job["threads"])
    batches = FixedBatches(bare, job["arrivals"], job["rows"], job["seed"])
    batches.run()
    padding = batches.padding_tokens / (batches.padding_tokens + batches.real_tokens)
    print(json.dumps({"outcomes": batches.outcomes, "padding": padding}))


if __name__ == "__main__":
    main()
