"""What a length costs: measured steps of a bundle beside the law that the latency model fits to them.

Half of the rounds teach the model, the other half are compared with what it then foresees. Rounds visit all sizes in
an order of their own, so that a slow moment of the machine does not fall on one size.
"""

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[2]))

from service.scheduling.latency import LatencyModel
from service.scheduling.work import Phase, Work, decode_work, prefill_work
from tests.benchmarks.engine_only import BareEngine
from tests.benchmarks.workloads import VOCAB

MODEL = "smollm2-135m"
CHUNKS = (16, 32, 64, 128, 256, 384, 512)
STARTS = (0, 512, 1536)
ROWS = (1, 4, 16, 32)
CONTEXTS = (32, 128, 512, 1024, 2048)
LONGEST = 2080

Size = tuple[Phase, int, int]  # a chunk's start and tokens, or a decode's rows and context


def work_of(size: Size) -> Work:
    """Return what a size is for the latency model."""
    phase, first, second = size
    return prefill_work(first, second) if phase == "prefill" else decode_work([second] * first)


class Steps:
    """Times single steps of an engine whose slots all hold `LONGEST` tokens."""

    def __init__(self, bare: BareEngine) -> None:
        self._graph = bare.graph
        draw = random.Random(0)
        self._tokens = [draw.randrange(3, VOCAB) for _ in range(LONGEST)]
        for start in range(0, LONGEST, 520):
            self._graph.chunk(0, self._tokens[start : start + 520], start)
        for slot in range(1, max(ROWS)):
            self._graph.copy(0, slot, LONGEST)

    def seconds(self, size: Size) -> float:
        """Return what one step of this size takes."""
        phase, first, second = size
        begun = time.perf_counter()
        if phase == "prefill":
            self._graph.chunk(0, self._tokens[first : first + second], first)
        else:
            self._graph.decode(self._tokens[:first], [second] * first)
        return time.perf_counter() - begun


def plot(times: dict[Size, list[float]], model: LatencyModel, path: Path) -> None:
    """Draw measured medians and the law, prefill and decode side by side."""
    figure, (prefill, decode) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for phase, axis, groups in (("prefill", prefill, STARTS), ("decode", decode, ROWS)):
        for number, group in enumerate(groups):
            sizes = [size for size in times if size[:2] == (phase, group)]
            label = f"behind {group} tokens" if phase == "prefill" else f"{group} row{'s' if group > 1 else ''}"
            lengths = [size[2] for size in sizes]
            measured = [1000 * statistics.median(times[size]) for size in sizes]
            axis.plot(lengths, measured, "o", color=f"C{number}", markersize=4)
            fitted = [1000 * (model.predict(size[0], work_of(size)) or 0.0) for size in sizes]
            axis.plot(lengths, fitted, color=f"C{number}", label=label)
        axis.set(title=phase, ylabel="milliseconds a step", ylim=(0, None))
        axis.grid(visible=True, alpha=0.3)
        axis.legend(fontsize="small")
    prefill.set(xlabel="tokens of the chunk")
    decode.set(xlabel="context of each row, in tokens", xscale="log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """Measure, fit, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("build/bundles"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=20, help="half of them teach (%(default)s)")
    parser.add_argument("--plot", type=Path, default=Path("docs/latency_by_length.png"), help="(%(default)s)")
    given = parser.parse_args()
    steps = Steps(BareEngine(given.repository, MODEL, given.threads))
    sizes: list[Size] = [("prefill", start, tokens) for start in STARTS for tokens in CHUNKS]
    sizes += [("decode", rows, context) for rows in ROWS for context in CONTEXTS]
    model, draw = LatencyModel(), random.Random(0)
    times: dict[Size, list[float]] = {size: [] for size in sizes}
    for number in range(given.rounds):
        for size in draw.sample(sizes, len(sizes)):
            seconds = steps.seconds(size)
            if number % 2 == 0:
                model.observe(size[0], work_of(size), seconds)
            else:
                times[size].append(seconds)
    print(f"{MODEL}, {given.threads} threads, {given.rounds} rounds")
    for phase in ("prefill", "decode"):
        constant, linear, quadratic = model.coefficients(phase) or (0.0, 0.0, 0.0)
        errors = [
            abs((model.predict(phase, work_of(size)) or 0.0) / seconds - 1)
            for size, measured in times.items()
            if size[0] == phase
            for seconds in measured
        ]
        print(
            f"{phase}: {1000 * constant:.3g} ms a run, {1e6 * linear:.3g} us a token, {1e9 * quadratic:.3g} ns an "
            f"attended position; median error of steps it has not seen {statistics.median(errors):.1%}"
        )
    plot(times, model, given.plot)
    print(f"plot: {given.plot}")


if __name__ == "__main__":
    main()
