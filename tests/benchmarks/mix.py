"""Goodput on a heavy-tailed mix: deadlines and foresight, beside first come first served, beside fixed batches.

The trace is committed (mix.csv): 95 % short prompts, 5 % long ones, bursts of twice the capacity. Its clock runs in
units of the machine's capacity, which is measured first, so the same mix is the same load anywhere. Deadlines are three
times what a request takes alone by the law that was measured at the start, and the same for all contenders.

- attendant: deadlines are sent; the server refuses what it foresees to be late and sizes prefill by its inter-token
  target.
- first come: the same engine with continuous batching, decode first, fixed chunks of 512; clients hang up at their
  deadline.
- fixed batches: up to 16 requests run until all of them are finished; clients hang up.

Contenders alternate. Each run is predicted by the simulator from what was known before it, and compared.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from service.scheduling.config import SchedulerConfig
from service.scheduling.non_negative import Triple
from service.scheduling.work import Phase
from service.simulation.fleet import simulate
from service.simulation.replica import Ending, Machine, Outcome
from service.simulation.report import LengthReport, length_report, percentiles
from service.simulation.table import columns
from service.simulation.trace import Arrival, read_trace
from service.simulation.virtual_engine import Laws
from tests.benchmarks.served import Served, run_python, serve

HERE = Path(__file__).parent
MODEL = "smollm2-135m"
KEY = f"{MODEL}/1"
TERMS = ("constant", "linear", "quadratic")
NUM_SLOTS, CAPACITY, FIXED_ROWS = 32, 8192, 16
KV_MEMORY = "3GiB"
SHORT = 512  # prompts up to here are short
DEADLINE_FACTOR = 3.0
INTER_TOKEN_TARGET = 0.03
SATURATIONS = 3  # of each server, of which the best says what the machine can do: noise only ever slows it
ATTENDANT, FIRST_COME, FIXED = "attendant", "first come", "fixed batches"
FLAGS = {
    ATTENDANT: ["--inter-token-target-seconds", str(INTER_TOKEN_TARGET)],
    FIRST_COME: ["--prefill-chunk-tokens", "512", "--inter-token-target-seconds", "0"],
}
SOLO = Arrival(arrival_seconds=0.0, prompt_tokens=48, output_tokens=32)


def machine(name: str, laws: Laws, overhead_seconds: float) -> Machine:
    """Return what the simulator takes a contender to be."""
    config = SchedulerConfig(
        num_slots=NUM_SLOTS,
        capacity=CAPACITY,
        kv_budget=NUM_SLOTS * CAPACITY,
        reuses_prefixes=True,
        joins_prompts=True,
    )
    if name == ATTENDANT:
        config = replace(config, inter_token_target=INTER_TOKEN_TARGET)
    else:
        config = replace(config, chunk_tokens=512)
    return Machine(config=config, laws=laws, overhead_seconds=overhead_seconds, sends_deadlines=name == ATTENDANT)


@dataclass(frozen=True, slots=True)
class Result:
    """What one contender made of one run of the mix."""

    outcomes: tuple[Outcome, ...]
    padding: float
    stolen: float = 0.0
    """Share of the processors' time that other machines took meanwhile."""

    @property
    def short(self) -> LengthReport:
        """Of short prompts."""
        return length_report(SHORT, [o for o in self.outcomes if o.arrival.prompt_tokens <= SHORT])

    @property
    def total(self) -> LengthReport:
        """Of all."""
        return length_report(None, self.outcomes)

    @property
    def times(self) -> dict[str, float]:
        """What predictions are compared in."""
        kinds = {"ttft": self.short.ttft, "itl": self.short.itl, "e2e": self.short.e2e}
        found = {f"{kind} {name}": getattr(kinds[kind], name) for kind in kinds for name in ("p50", "p95")}
        return {name: seconds for name, seconds in found.items() if seconds is not None}


@dataclass(slots=True)
class Contender:
    """One way to serve, and how it did in each round."""

    name: str
    server: Served | None
    results: list[Result] = field(default_factory=list)
    predicted: list[Result] = field(default_factory=list)


class Bench:
    """The mix on one machine.

    Args:
        repository: of bundles.
        threads: of ONNX Runtime.
        trace: one request a second at capacity, in the mean.
    """

    def __init__(self, repository: Path, threads: int, trace: Sequence[Arrival]) -> None:
        self._repository = repository
        self._threads = threads
        self._trace = list(trace)
        self._seed = 0
        self.arrivals: list[Arrival] = []
        self.capacity = 0.0
        self.overhead_seconds = 0.0

    @contextlib.contextmanager
    def contenders(self) -> Iterator[list[Contender]]:
        """Start the servers; the fixed batches have none."""
        with contextlib.ExitStack() as stack:
            # A server at rest replays nothing: it would take the processors from the one that is measured.
            flags = ["--max-num-seqs", str(NUM_SLOTS), "--kv-memory", KV_MEMORY, "--canary-rate", "0"]
            yield [
                Contender(name, stack.enter_context(serve(self._repository, [MODEL], self._threads, [*flags, *own])))
                for name, own in FLAGS.items()
            ] + [Contender(FIXED, None)]

    def prepare(self, contenders: Sequence[Contender]) -> None:
        """Measure what the machine can do and what a request takes alone, and fix arrivals and deadlines."""
        servers = running(contenders)
        rates = [[self._saturated(server) for server in servers] for _ in range(SATURATIONS)]
        self.capacity = max(map(max, rates))
        laws = learned(servers[0])
        self.overhead_seconds = self._overhead(max(ours for ours, *_ in rates), laws)
        solo = [self.replay(servers[0], [SOLO], sends=False)[0] for _ in range(5)]
        self.arrivals = [
            replace(
                arrival,
                arrival_seconds=arrival.arrival_seconds / self.capacity,
                budget_seconds=DEADLINE_FACTOR * (self._solo(arrival, laws, self.overhead_seconds).e2e or 0.0),
            )
            for arrival in self._trace
        ]
        measured = statistics.median(outcome.e2e or 0.0 for outcome in solo)
        foreseen = self._solo(SOLO, laws, self.overhead_seconds).e2e or 0.0
        shown = [" ".join(f"{rate:.2f}" for rate in of_server) for of_server in zip(*rates, strict=True)]
        print(f"saturated, requests/s: {', '.join(f'{c.name} {of}' for c, of in zip(contenders, shown, strict=False))}")
        print(
            f"capacity {self.capacity:.2f} requests/s; a step costs {1000 * self.overhead_seconds:.2f} ms beside runs"
        )
        print(
            f"{SOLO.prompt_tokens} + {SOLO.output_tokens} tokens alone: {measured:.3f} s, as foreseen {foreseen:.3f} s"
        )
        for phase, law in laws.of.items():
            print(f"  {phase}: {law[0]:.3g} s a run, {law[1]:.3g} s a token, {law[2]:.3g} s an attended position")

    def _saturated(self, server: Served) -> float:
        """Return the requests a second that a server finishes when all of them come at once."""
        return _rate(self.replay(server, self._at_once, sends=False))

    @property
    def _at_once(self) -> list[Arrival]:
        return [replace(arrival, arrival_seconds=0.0) for arrival in self._trace[: 4 * NUM_SLOTS]]

    def _overhead(self, rate: float, laws: Laws) -> float:
        """Return the seconds of a step beside its runs with which the simulator is as fast as the server was."""
        low, high = 0.0, 0.1
        while high - low > 1e-5:
            middle = (low + high) / 2
            simulated = _rate(simulate(machine(ATTENDANT, laws, middle), self._at_once).outcomes)
            low, high = (middle, high) if simulated > rate else (low, middle)
        return low

    @staticmethod
    def _solo(arrival: Arrival, laws: Laws, overhead_seconds: float) -> Outcome:
        alone = replace(arrival, arrival_seconds=0.0, budget_seconds=None)
        return simulate(machine(ATTENDANT, laws, overhead_seconds), [alone]).outcomes[0]

    def replay(self, server: Served, arrivals: Sequence[Arrival], *, sends: bool) -> tuple[Outcome, ...]:
        """Send arrivals to a server, with prompts that it has never seen."""
        self._seed += 1
        job: dict[str, Any] = {"address": server.address, "model": MODEL, "seed": self._seed, "sends": sends}
        return _outcomes(arrivals, run_python(HERE / "replay.py", job | {"arrivals": [asdict(a) for a in arrivals]}))

    def run(self, contender: Contender) -> None:
        """Let a contender run the mix once, predicted beforehand."""
        stolen = _stolen()
        if contender.server is None:
            self._seed += 1
            job = {"repository": str(self._repository), "model": MODEL, "threads": self._threads, "seed": self._seed}
            job |= {"rows": FIXED_ROWS, "arrivals": [asdict(arrival) for arrival in self.arrivals]}
            answer: Any = run_python(HERE / "fixed_batches.py", job)
            outcomes, padding = _outcomes(self.arrivals, answer["outcomes"]), answer["padding"]
        else:
            contender.predicted.append(self.predict(contender.name, learned(contender.server)))
            before = padded(contender.server)
            outcomes = self.replay(contender.server, self.arrivals, sends=contender.name == ATTENDANT)
            after = padded(contender.server)
            padding = (after[0] - before[0]) / max(1.0, after[1] - before[1])
        contender.results.append(Result(outcomes, padding, _since(stolen)))

    def predict(self, name: str, laws: Laws) -> Result:
        """Return what the simulator makes of the mix, on a server that was saturated before, as the real one was."""
        machine_of = machine(name, laws, self.overhead_seconds)
        before = simulate(machine_of, self._at_once)
        pause = before.seconds + 1.0
        mix = [replace(arrival, arrival_seconds=arrival.arrival_seconds + pause) for arrival in self.arrivals]
        run = simulate(machine_of, [*self._at_once, *mix])
        (first,), (both,) = before.efforts, run.efforts
        padding = both.padding_tokens - first.padding_tokens
        real = both.real_tokens - first.real_tokens
        return Result(run.outcomes[len(before.outcomes) :], padding / max(1, padding + real))


def running(contenders: Sequence[Contender]) -> list[Served]:
    """Return the servers, ours first."""
    return [contender.server for contender in contenders if contender.server is not None]


def learned(server: Served) -> Laws:
    """Return what a server has learned of its costs."""

    def law(phase: Phase) -> Triple:
        name = "attendant_latency_model_coefficient"
        constant, linear, quadratic = (server.metric(name, model=KEY, phase=phase, term=term) for term in TERMS)
        return constant, linear, quadratic

    return Laws({"prefill": law("prefill"), "decode": law("decode")})


def padded(server: Served) -> tuple[float, float]:
    """Return how many tokens were padding so far, and how many there were."""
    name = "attendant_batch_tokens_total"
    padding, real = (server.metric(name, model=KEY, kind=kind) for kind in ("padding", "real"))
    return padding, padding + real


def _rate(outcomes: Sequence[Outcome]) -> float:
    """Return requests a second while there are more than can run: between a tenth and four fifths finished."""
    ends = sorted(outcome.ended_seconds for outcome in outcomes)
    first, last = len(ends) // 10, len(ends) * 4 // 5
    return (last - first) / (ends[last] - ends[first])


def _outcomes(arrivals: Sequence[Arrival], found: Any) -> tuple[Outcome, ...]:
    return tuple(
        Outcome(arrival, **{**fields, "ending": Ending(fields["ending"])})
        for arrival, fields in zip(arrivals, found, strict=True)
    )


def _stolen() -> tuple[float, float]:
    """Return how much of the processors' time other machines took so far, and when."""
    line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0].split()
    return int(line[8]) / os.sysconf("SC_CLK_TCK") / (os.cpu_count() or 1), time.monotonic()


def _since(before: tuple[float, float]) -> float:
    after = _stolen()
    return (after[0] - before[0]) / (after[1] - before[1])


def show(contenders: Sequence[Contender]) -> None:
    """Print every round, and what the best and the middle one come to."""
    heads = ("", "goodput", "itl p50", "itl p95", "ttft p50", "ttft p95", "long ttft p95", "padding", "wait", "stolen")
    rows = [heads]
    for contender in contenders:
        for kind, results in ((contender.name, contender.results), ("  foreseen", contender.predicted[:1])):
            rows += [(kind, *_cells(result)) for result in results]
    print(
        f"\nitl and ttft of prompts up to {SHORT} tokens, in ms; the longest wait for a first token or an end, in s\n"
    )
    print(columns(rows))
    for contender in contenders:
        if contender.results:
            print(f"\n{contender.name} ended: {contender.results[-1].total.endings}", end="")
    print()
    by_name = {contender.name: contender.results for contender in contenders}
    ours, theirs = by_name[ATTENDANT], by_name[FIRST_COME]
    on_time = [sum(result.total.on_time for result in results) for results in (ours, theirs)]
    print(f"\nattendant / first come, all rounds: goodput {on_time[0] / max(1, on_time[1]):.2f}", end="")
    gaps = [
        a.times["itl p95"] / b.times["itl p95"]
        for a, b in zip(ours, theirs, strict=True)
        if "itl p95" in a.times and "itl p95" in b.times
    ]
    if gaps:
        print(f"; p95 between tokens of short prompts, median of pairs: {statistics.median(gaps):.2f}", end="")
    print()
    for contender in contenders:
        _show_errors(contender)


def _show_errors(contender: Contender) -> None:
    """Print how far the simulator was off, in each time, in the best and in the middle round."""
    if not contender.predicted:
        return
    rows = [("foreseen / measured - 1", "best", "median", "measured: slowest / fastest round")]
    for name in contender.results[0].times:
        pairs = [
            (foreseen.times[name], measured.times[name])
            for foreseen, measured in zip(contender.predicted, contender.results, strict=True)
            if name in foreseen.times and name in measured.times
        ]
        if not pairs:
            continue
        errors = sorted((foreseen / measured - 1 for foreseen, measured in pairs), key=abs)
        times = [measured for _, measured in pairs]
        cells = (f"{errors[0]:+.1%}", f"{errors[len(errors) // 2]:+.1%}", f"{max(times) / min(times):.2f}")
        rows.append((f"{contender.name}, {name}", *cells))
    print("\n" + columns(rows))


def _cells(result: Result) -> tuple[str, ...]:
    short = result.short
    long = percentiles(o.ttft for o in result.outcomes if o.arrival.prompt_tokens > SHORT)
    times = (short.itl.p50, short.itl.p95, short.ttft.p50, short.ttft.p95, long.p95)
    shown = tuple("-" if seconds is None else f"{1000 * seconds:.1f}" for seconds in times)
    wait = f"{result.total.longest_wait_seconds:.2f}"
    return (f"{result.total.goodput:.1%}", *shown, f"{result.padding:.1%}", wait, f"{result.stolen:.1%}")


def overload(bench: Bench, contender: Contender, minutes: float) -> None:
    """Print memory and solo latency before and after so many minutes at twice the capacity."""
    assert contender.server is not None
    server, mix = contender.server, bench.arrivals
    length = max(arrival.arrival_seconds for arrival in mix) / 2

    def at_rest(when: str) -> None:
        solo = [bench.replay(server, [SOLO], sends=False)[0] for _ in range(11)]
        gaps = percentiles(gap for outcome in solo for gap in outcome.gaps)
        ttft = statistics.median(outcome.ttft or 0.0 for outcome in solo)
        print(
            f"{when}: {server.resident_bytes() / 2**20:.0f} MiB resident, first token {1000 * ttft:.1f} ms, between "
            f"tokens {1000 * (gaps.p50 or 0):.2f} ms (p95 {1000 * (gaps.p95 or 0):.2f})",
            flush=True,
        )

    at_rest("before")
    for number in range(1, max(1, round(60 * minutes / length)) + 1):
        twice = [replace(arrival, arrival_seconds=arrival.arrival_seconds / 2) for arrival in mix]
        result = Result(bench.replay(server, twice, sends=True), 0.0)
        resident = server.resident_bytes() / 2**20
        print(f"  {number * length / 60:.1f} min: {resident:.0f} MiB, goodput {result.total.goodput:.1%}", flush=True)
    at_rest("after")


def main() -> None:
    """Measure, alternate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("build/bundles"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5, help="of the servers; fixed batches run once (%(default)s)")
    parser.add_argument("--requests", type=int, help="only the first so many of the trace, for a trial")
    parser.add_argument("--overload-minutes", type=float, help="instead: memory and latency before and after overload")
    given = parser.parse_args()
    bench = Bench(given.repository, given.threads, read_trace(HERE / "mix.csv")[: given.requests])
    with bench.contenders() as contenders:
        servers = running(contenders)
        bench.prepare(contenders)
        if given.overload_minutes:
            overload(bench, contenders[0], given.overload_minutes)
            return
        for number in range(given.rounds):
            for contender in contenders:
                if contender.server is not None or number == 0:
                    bench.run(contender)
        name = "attendant_latency_model_error_ratio"
        errors = [servers[0].metric(name, model=KEY, phase=phase) for phase in ("prefill", "decode")]
    show(contenders)
    prefill, decode = errors
    print(
        f"\nmedian error of the newest steps, each foreseen before it ran: prefill {prefill:.1%}, decode {decode:.1%}"
    )


if __name__ == "__main__":
    main()
