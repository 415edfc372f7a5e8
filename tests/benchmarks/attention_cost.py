"""What attention costs by length, each mechanism and public implementations: `make attention-cost`.

Time is processor time of one thread, so that other work on the machine counts as little as can be. Rounds alternate
between all that is compared; best and median are kept. Memory is the most that torch held at once beside the input.
"""

import argparse
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells when it starts, otherwise

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from local_attention import LocalAttention
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from models.attention.functional import allow, attend, attend_causally
from models.attention.linear import LinearAttention, favor_features, linear_attend
from models.attention.longformer import LongformerAttention
from models.attention.memory import MemoryAttention
from models.attention.multihead import MultiHeadAttention
from models.attention.scores import Additive
from models.attention.window import window_attend
from models.states import Chunk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it asks torch for deprecated names
    from performer_pytorch import FastAttention

D_MODEL, NUM_HEADS, HEAD_DIM = 256, 4, 64
WINDOW = 128  # tokens, the token itself included
NUM_FEATURES = 128
D_ADDITIVE = 64
LEAST_SECONDS = 0.01  # a shorter call is repeated within a sample

Call = Callable[[], object]


@dataclass
class Samples:
    """Seconds of a call, one for each round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The shortest."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)


def alternate(calls: dict[str, Call], rounds: int) -> dict[str, Samples]:
    """Time all calls in each round, after one call of each that does not count."""
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, math.ceil(LEAST_SECONDS / max(_seconds(call, 1), 1e-6)))
    samples = {name: Samples() for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].seconds.append(_seconds(call, repeats[name]))
    return samples


def _seconds(call: Call, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def peak_bytes(call: Call) -> int:
    """Return the most that torch held at once during a call, beside what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def mechanisms(num_tokens: int) -> dict[str, Call]:
    """Return one call of each mechanism whose memory allows this length."""
    x = torch.randn(1, num_tokens, D_MODEL)
    chunk = Chunk.of(x[..., 0])
    first = Chunk.of(x[..., 0], is_global=torch.arange(num_tokens)[None] == 0)

    def layer(attention: nn.Module, chunk: Chunk = chunk, *, need_weights: bool = False) -> Call:
        attention.eval()
        return lambda: attention(x, chunk, need_weights=need_weights)

    softmax = MultiHeadAttention(D_MODEL, NUM_HEADS, causal=True)
    calls = {
        "softmax": layer(softmax),
        "window": layer(MultiHeadAttention(D_MODEL, NUM_HEADS, causal=True, window=WINDOW)),
        "Longformer": layer(LongformerAttention(D_MODEL, NUM_HEADS, window=WINDOW), first),
        "Performer": layer(LinearAttention(D_MODEL, NUM_HEADS, num_features=NUM_FEATURES, causal=True)),
        "ELU + 1": layer(LinearAttention(D_MODEL, NUM_HEADS, features="elu", causal=True)),
    }
    if num_tokens <= 4096:
        calls["softmax, weights"] = layer(softmax, need_weights=True)
    if num_tokens <= 2048:
        additive = MemoryAttention(Additive(D_MODEL, D_MODEL, D_ADDITIVE)).eval()
        calls["additive"] = lambda: additive(x, additive.project(x))
    return calls


def rivals(num_tokens: int) -> dict[str, tuple[Call, Call]]:
    """Return ours and a public implementation of the same thing, from queries, keys and values on."""
    query, key, value = (0.5 * torch.randn(1, NUM_HEADS, num_tokens, HEAD_DIM) for _ in range(3))
    local = LocalAttention(WINDOW - 1, causal=True, exact_windowsize=True, use_rotary_pos_emb=False, autopad=True)
    around = LocalAttention(WINDOW // 2, causal=False, exact_windowsize=True, use_rotary_pos_emb=False, autopad=True)
    fast = FastAttention(HEAD_DIM, NUM_FEATURES)
    projection = fast.projection_matrix

    def linear(*, causal: bool) -> Tensor:
        phi_query = favor_features(query, projection, is_query=True)
        return linear_attend(phi_query, favor_features(key, projection, is_query=False), value, causal=causal)[0]

    pairs: dict[str, tuple[Call, Call]] = {
        "causal: torch SDPA": (
            lambda: attend_causally(query, key, value, key_valid=torch.ones(1, num_tokens, dtype=torch.bool)),
            lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True),
        ),
        "window, causal: local-attention": (
            lambda: window_attend(query, key, value, left=WINDOW - 1, right=0),
            lambda: local(query, key, value),
        ),
        "window, both sides: local-attention": (
            lambda: window_attend(query, key, value, left=WINDOW // 2, right=WINDOW // 2),
            lambda: around(query, key, value),
        ),
        "FAVOR+, both sides: performer-pytorch": (lambda: linear(causal=False), lambda: fast(query, key, value)),
    }
    if num_tokens <= 4096:  # the mask alone is T x T, and performer-pytorch holds T / 128 x F x D for each head
        valid = torch.arange(num_tokens)[None] < num_tokens - num_tokens // 8
        mask = allow(torch.arange(num_tokens)[None], torch.arange(num_tokens)[None], key_valid=valid)
        pairs["padding mask: torch SDPA"] = (
            lambda: attend(query, key, value, mask),
            lambda: F.scaled_dot_product_attention(query, key, value, mask),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            slow = FastAttention(HEAD_DIM, NUM_FEATURES, causal=True)
        pairs["FAVOR+, causal: performer-pytorch"] = (lambda: linear(causal=True), lambda: slow(query, key, value))
    return pairs


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Return the slope of log values over log lengths on the longer half of the lengths."""
    half = len(lengths) // 2
    logs = [[math.log(number) for number in numbers[half:]] for numbers in (lengths, values)]
    return statistics.linear_regression(*logs).slope


def plot(times: dict[str, dict[int, float]], memory: dict[str, dict[int, float]], path: Path) -> None:
    """Draw both over the length, on logarithmic axes."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, series, label in ((axes[0], times, "milliseconds"), (axes[1], memory, "MiB")):
        for name, values in series.items():
            axis.loglog(list(values), list(values.values()), marker="o", markersize=3, label=name)
        axis.set(xlabel="tokens", ylabel=label)
        axis.grid(visible=True, which="major", alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def table(series: dict[str, dict[int, float]], lengths: Sequence[int], unit: str) -> None:
    """Print one row for each mechanism, with the exponent at its end."""
    print(f"\n| {unit} | {' | '.join(str(length) for length in lengths)} | exponent |")
    print(f"|---|{'---:|' * (len(lengths) + 1)}")
    for name, values in series.items():
        cells = [f"{values[length]:.3g}" if length in values else "" for length in lengths]
        print(f"| {name} | {' | '.join(cells)} | {exponent(list(values), list(values.values())):.2f} |")


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=16384, help="tokens; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--plot", type=Path, default=Path("build/attention_cost.png"), help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths = [length for length in (2**power for power in range(7, 21)) if length <= arguments.longest]
    times: dict[str, dict[int, float]] = {}
    memory: dict[str, dict[int, float]] = {}
    with torch.inference_mode():
        for length in lengths:
            calls = mechanisms(length)
            for name, samples in alternate(calls, arguments.rounds).items():
                times.setdefault(name, {})[length] = 1000 * samples.best
                memory.setdefault(name, {})[length] = peak_bytes(calls[name]) / 2**20
        print(f"A layer of width {D_MODEL}, {NUM_HEADS} heads, window {WINDOW}, {NUM_FEATURES} features, float32.")
        table(times, lengths, "ms, best")
        table(memory, lengths, "MiB, peak")
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(times, memory, arguments.plot)
        print(f"\nplot: {arguments.plot}")
        print("\n| ms, best (median) | tokens | ours | theirs | ours / theirs |\n|---|---:|---:|---:|---:|")
        for length in (length for length in (1024, 4096, 16384) if length <= arguments.longest):
            for name, (ours, theirs) in rivals(length).items():
                a, b = alternate({"ours": ours, "theirs": theirs}, arguments.rounds).values()
                cells = [f"{1000 * one.best:.3g} ({1000 * one.median:.3g})" for one in (a, b)]
                ratio = f"{a.best / b.best:.2f} ({a.median / b.median:.2f})"
                print(f"| {name} | {length} | {' | '.join(cells)} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
