"""What beginnings that prompts share are worth: the same engine with and without looking for them, alternating.

Two cases: requests that all begin with one system prompt, and one conversation that grows turn by turn.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from service.engine.engine import Engine
from service.scheduling.config import SchedulerConfig
from service.scheduling.request import Request, SamplingParams
from service.scheduling.scheduler import Scheduler
from tests.benchmarks.engine_only import NUM_SLOTS, BareEngine

ROUNDS = 3
MODEL = "smollm2-135m"
SYSTEM_TOKENS, NUM_REQUESTS, QUESTION_TOKENS, ANSWER_TOKENS = 1000, 16, 20, 20
NUM_TURNS, TURN_TOKENS = 8, 100


class Server:
    """A scheduler over one bundle's engine, which answers requests and says when their first tokens came."""

    def __init__(self, bare: BareEngine, *, reuses_prefixes: bool) -> None:
        self._engine = Engine(bare.graph)
        self._scheduler = Scheduler(
            SchedulerConfig(
                num_slots=NUM_SLOTS,
                capacity=bare.size.capacity,
                kv_budget=bare.size.budget,
                reuses_prefixes=reuses_prefixes,
            )
        )

    def answer(self, prompts: list[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[float]]:
        """Return the answers, and the seconds after which each request got its first token."""
        begun = time.perf_counter()
        requests = [
            Request(
                request_id=str(index),
                prompt=prompt,
                max_tokens=ANSWER_TOKENS,
                sampling=SamplingParams(temperature=0.0),
                arrival=begun + 1e-6 * index,
            )
            for index, prompt in enumerate(prompts)
        ]
        for request in requests:
            self._scheduler.add(request)
        answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
        first: dict[str, float] = {}
        while self._scheduler.has_work:
            plan = self._scheduler.schedule(time.perf_counter())
            for event in self._scheduler.update(plan, self._engine.execute(plan), time.perf_counter()):
                name = event.request.request_id
                answers[name].append(event.token.token_id)
                first.setdefault(name, time.perf_counter() - begun)
        return [tuple(answers[request.request_id]) for request in requests], list(first.values())


def tokens(draw: random.Random, count: int) -> tuple[int, ...]:
    """Return so many token ids."""
    return tuple(draw.randrange(1000, 40000) for _ in range(count))


def shared_system_prompt(server: Server, seed: int) -> list[float]:
    """Return the times to the first token of requests that come at once."""
    draw = random.Random(seed)
    system = tokens(draw, SYSTEM_TOKENS)
    return server.answer([(*system, *tokens(draw, QUESTION_TOKENS)) for _ in range(NUM_REQUESTS)])[1]


def conversation(server: Server, seed: int) -> list[float]:
    """Return the times to the first token of the turns of one conversation."""
    draw, history, times = random.Random(seed), (), []
    for _ in range(NUM_TURNS):
        history = (*history, *tokens(draw, TURN_TOKENS))
        (answer,), (first,) = server.answer([history])
        history = (*history, *answer)
        times.append(first)
    return times


def main() -> None:
    """Print median and longest time to the first token of both cases, with and without."""
    bare = BareEngine(Path("build/bundles"), MODEL, threads=2)
    cases: dict[str, Callable[[Server, int], list[float]]] = {
        f"{NUM_REQUESTS} requests behind {SYSTEM_TOKENS} shared tokens": shared_system_prompt,
        f"{NUM_TURNS} turns of {TURN_TOKENS} tokens": conversation,
    }
    for name, case in cases.items():
        measured: dict[bool, list[list[float]]] = {True: [], False: []}
        for seed in range(ROUNDS):
            for reuses_prefixes in (True, False):
                measured[reuses_prefixes].append(case(Server(bare, reuses_prefixes=reuses_prefixes), seed))
        print(f"{MODEL}: {name}; time to the first token, best of {ROUNDS} rounds")
        for reuses_prefixes, rounds in measured.items():
            median = min(statistics.median(times) for times in rounds)
            longest = min(max(times) for times in rounds)
            shown = "with reuse" if reuses_prefixes else "without"
            print(f"  {shown:<12}{median * 1000:8.0f} ms median {longest * 1000:8.0f} ms longest")


if __name__ == "__main__":
    main()
