"""The device sampler with real graphs, on the host's memory and on CUDA: it chooses what the host's sampler chooses.

On CUDA equals may rank in another order (docs/bundle.md), and sums round otherwise: both are allowed for there.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from attendant.bundle import DType, GraphKind, Manifest
from export.sampler import sampler_graphs
from service.bundle import BundleRefused, FoundBundle
from service.engine.adjustments import Adjustments
from service.engine.cuda_device import CudaDevice
from service.engine.device import Array, Buffer, Device, HostDevice
from service.engine.device_sampler import DeviceSampler, Outcome
from service.engine.runtime import use_threads
from service.engine.sampling import NotFinite, Sampler, uniform, uniforms
from service.scheduling.plan import Sample
from service.scheduling.request import Request, SamplingParams, Token
from tests.gpu.conftest import cuda

__all__ = ["cuda"]  # a fixture

V = 5003
ROWS = 12


class Counting(Device):
    """A device that counts the bytes that cross to it and back."""

    up = down = 0

    def _upload(self, array: Array, buffer: Buffer) -> None:
        self.up += array.nbytes
        super()._upload(array, buffer)

    def _download(self, buffer: Buffer, array: Array) -> None:
        self.down += array.nbytes
        super()._download(buffer, array)


class CountingHost(Counting, HostDevice):
    """The host's memory."""


class CountingCuda(Counting, CudaDevice):
    """A GPU."""


@dataclass(frozen=True)
class Bench:
    """A device sampler, and the logits that it looks at."""

    sampler: DeviceSampler
    logits: Buffer
    device: Counting

    @property
    def is_exact(self) -> bool:
        return isinstance(self.device, CountingHost)

    def choose(self, rows: np.ndarray, samples: list[Sample | None]) -> list[Outcome]:
        self.device.upload(rows, self.logits[: len(rows)])
        self.device.up = self.device.down = 0
        return self.sampler.choose(samples)


@pytest.fixture(scope="module")
def found(sampler_directory: Path) -> FoundBundle:
    use_threads(2)
    return FoundBundle(sampler_directory, Manifest.model_construct(graphs=sampler_graphs(V)), "")


@pytest.fixture(scope="module", params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Counting:
    if request.param == "host":
        return CountingHost()
    request.getfixturevalue("cuda")
    return CountingCuda()


def bench_of(found: FoundBundle, device: Counting, buckets: tuple[int, ...] = ()) -> Bench:
    logits = device.allocate((ROWS, V), DType.FLOAT32)
    return Bench(DeviceSampler(found, logits, buckets), logits, device)


@pytest.fixture(scope="module")
def bench(found: FoundBundle, device: Counting) -> Bench:
    return bench_of(found, device)


def request_of(params: SamplingParams, name: str = "r", **fields: object) -> Request:
    given = {"prompt": (1, 2, 3), "max_tokens": 99, "arrival": 0.0} | fields
    return Request(request_id=name, sampling=params, **given)


def on_host(row: np.ndarray, wanted: Sample) -> Token:
    return Sampler(V).choose(row, int(row.argmax()), wanted)


def random_request(numbers: np.random.Generator, name: str) -> Request:
    pick = numbers.choice
    some = tuple(int(token) for token in numbers.integers(0, V, 40))
    biases = {token: float(pick([-100, 3.5, 20])) for token in some[:3]}
    params = SamplingParams(
        temperature=float(pick([0, 0.01, 0.5, 1, 1.5, 10])),
        top_k=int(pick([0, 0, 1, 7, 300, 2000, V, V + 5])),
        top_p=float(pick([1, 1, 0.95, 0.5, 1e-9])),
        min_p=float(pick([0, 0, 0.05, 0.7, 1])),
        repetition_penalty=float(pick([1, 1, 1.3, 0.8])),
        presence_penalty=float(pick([0, 0, 0.5, -1])),
        frequency_penalty=float(pick([0, 0, 0.2])),
        logit_bias=tuple(sorted(biases.items())) if pick(2) else (),
        seed=int(numbers.integers(2**63)),
    )
    return request_of(
        params,
        name,
        prompt=some[: int(pick([1, 5, 40]))],
        min_tokens=int(pick([0, 0, 4])),
        eos_token_ids=frozenset(some[:2]),
        stop_token_ids=frozenset(some[5:7]),
        logprobs=bool(pick(2)),
    )


def random_row(numbers: np.random.Generator) -> np.ndarray:
    row = numbers.standard_normal(V) * numbers.choice([0.01, 1, 4, 30]) + numbers.choice([0, 1000])
    if numbers.random() < 0.2:
        row = np.round(row)
    if numbers.random() < 0.2:
        row[numbers.random(V) < 0.8] = -np.inf
    return row.astype(np.float32)


def at_an_edge(row: np.ndarray, wanted: Sample, ours: int, theirs: int) -> bool:
    """Whether two tokens are neighbours where the number falls, so that the rounding of exp decides."""
    params = wanted.request.sampling
    probabilities = np.exp((row.astype(np.float64) - row.max()) / params.temperature)
    probabilities /= probabilities.sum()
    return abs(probabilities[ours] - probabilities[theirs]) < 1e-6 or max(probabilities[[ours, theirs]]) < 1e-6


def agree(ours: Outcome, theirs: Token, row: np.ndarray, wanted: Sample) -> bool:
    assert isinstance(ours, Token)
    if ours.token_id != theirs.token_id:
        return at_an_edge(row, wanted, ours.token_id, theirs.token_id)
    if theirs.logprob is None or ours.logprob is None:
        return ours == theirs
    exact = row.astype(np.float64) - row.max()
    exact -= np.log(np.exp(exact).sum())
    told = [(ours.logprob, theirs.logprob), *((logprob, exact[token_id]) for token_id, logprob in ours.top)]
    told += [(one[1], other[1]) for one, other in zip(ours.top, theirs.top, strict=True)]
    return all(one == other or abs(one - other) < 1e-4 for one, other in told)


def test_sequences_of_every_kind_get_the_tokens_that_the_host_chooses(bench: Bench) -> None:
    numbers = np.random.default_rng(1)
    running: list[tuple[Request, tuple[int, ...]] | None] = [None] * ROWS
    different = total = 0
    for step in range(60):
        num_rows = int(numbers.integers(1, ROWS + 1))
        rows = np.stack([random_row(numbers) for _ in range(num_rows)])
        samples: list[Sample | None] = []
        for slot in range(num_rows):
            if running[slot] is None or numbers.random() < 0.08:
                running[slot] = (random_request(numbers, f"{slot}-{step}"), ())
            request, output = running[slot]
            if request.logprobs:
                request = replace(request, top_logprobs=20) if request.top_logprobs == 0 and not output else request
                running[slot] = (request, output)
            seen = output if request.sampling.adjusts_logits else ()
            wanted = Sample(request, len(request.prompt) + len(output), len(output), seen)
            samples.append(wanted if numbers.random() < 0.9 else None)
        for slot, (outcome, wanted) in enumerate(zip(bench.choose(rows, samples), samples, strict=True)):
            if wanted is None:
                assert outcome is None
                continue
            expected = on_host(rows[slot], wanted)
            assert agree(outcome, expected, rows[slot], wanted), (step, slot, wanted, outcome, expected)
            assert isinstance(outcome, Token)
            total += 1
            different += outcome.token_id != expected.token_id
            request, output = running[slot]
            running[slot] = (request, (*output, expected.token_id))
    assert total > 300 and different <= (1 if bench.is_exact else total // 10)


def test_a_row_alone_gives_the_bits_it_gives_among_others(bench: Bench) -> None:
    numbers = np.random.default_rng(2)
    rows = np.stack([random_row(numbers) for _ in range(ROWS)])
    params = SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.2, seed=4)
    samples = [
        Sample(request_of(params, f"{row}", logprobs=True, top_logprobs=9), row, 3, (9, 9, row)) for row in range(ROWS)
    ]
    together = bench.choose(rows, [*samples])
    for row in range(ROWS):
        alone = bench.choose(rows[row : row + 1], [samples[row]])[0]
        assert alone == together[row] if bench.is_exact else agree(alone, together[row], rows[row], samples[row])


def test_a_row_that_is_not_finite_fails_alone(bench: Bench) -> None:
    rows = np.zeros((5, V), np.float32)
    rows[:, 8] = 2.0
    rows[1, 77], rows[2, 4], rows[3] = np.nan, np.inf, -np.inf
    greedy = Sample(request_of(SamplingParams(temperature=0.0), logprobs=True), 3, 0)
    first, *broken, last = bench.choose(rows, [greedy, None, greedy, greedy, greedy])
    assert isinstance(first, Token) and first == last and first.token_id == 8
    assert all(isinstance(outcome, NotFinite) for outcome in broken)


def test_only_what_changed_goes_to_the_device_and_only_tokens_come_back(bench: Bench) -> None:
    rows = np.stack([random_row(np.random.default_rng(3))] * 4)
    greedy = request_of(SamplingParams(temperature=0.0))
    bench.choose(rows, [Sample(greedy, 3, 0)] * 4)
    bench.choose(rows, [Sample(greedy, 4, 1)] * 4)
    assert (bench.device.up, bench.device.down) == (0, 4 * 8)
    drawn = request_of(SamplingParams(top_k=50, top_p=0.9, seed=3))
    bench.choose(rows, [Sample(drawn, 3, 0)] * 4)
    bench.choose(rows, [Sample(drawn, 4, 1)] * 4)
    assert (bench.device.up, bench.device.down) == (4 * 8, 4 * 8)
    assert bench.choose(rows, [None] * 4) == [None] * 4
    assert (bench.device.up, bench.device.down) == (0, 0)


def test_draws_behind_the_ranked_come_to_the_host_and_no_others(bench: Bench) -> None:
    rows = (np.random.default_rng(4).standard_normal((ROWS, V)) * 0.1).astype(np.float32)
    rows[:, :300] += 5  # nine tenths of the whole
    wanted = [Sample(request_of(SamplingParams(top_p=0.99, seed=seed), str(seed)), 3, 0) for seed in range(ROWS)]
    outcomes = bench.choose(rows, [*wanted])
    assert outcomes == [on_host(*pair) for pair in zip(rows, wanted, strict=True)]
    behind = sum(outcome.token_id >= 300 for outcome in outcomes if isinstance(outcome, Token))
    assert 0 < behind < ROWS / 2
    assert bench.device.down == ROWS * 8 + behind * V * 4


def test_sizes_between_buckets_are_padded_and_captured_ones_repeat(found: FoundBundle, device: Counting) -> None:
    bench = bench_of(found, device, (1, 2, 4, 8, ROWS))
    bench.sampler.capture()
    numbers = np.random.default_rng(5)
    rows = (numbers.standard_normal((ROWS, V)) * 3).astype(np.float32)
    for num_rows in range(1, ROWS + 1):
        params = SamplingParams(temperature=0.8, top_k=int(numbers.choice([0, 30])), seed=num_rows)
        wanted = [Sample(request_of(params, str(row)), row, 0) for row in range(num_rows)]
        assert bench.choose(rows[:num_rows], [*wanted]) == [on_host(rows[row], wanted[row]) for row in range(num_rows)]


def test_beams_of_one_request_are_kept_apart(bench: Bench) -> None:
    row = random_row(np.random.default_rng(6))
    request = request_of(SamplingParams(temperature=0.0, repetition_penalty=5.0), logprobs=True, top_logprobs=64)
    best = [int(token) for token in np.argsort(-row)[:3]]
    samples = [Sample(request, 5, 2, output) for output in ((best[0], best[1]), (best[0], best[2]), (best[1], best[2]))]
    outcomes = bench.choose(np.stack([row] * 3), [*samples])
    for outcome, wanted in zip(outcomes, samples, strict=True):
        assert agree(outcome, on_host(row, wanted), row, wanted)


def test_adjustments_follow_a_sequence_and_no_other() -> None:
    request = request_of(SamplingParams(frequency_penalty=0.5), min_tokens=2, eos_token_ids=frozenset({7}))
    adjustments = Adjustments(request)
    adjustments.advance(Sample(request, 3, 0, ()))
    adjustments.advance(Sample(request, 4, 1, (9,)))
    before = [*adjustments.changes]
    adjustments.advance(Sample(request, 4, 1, (9,)))
    assert adjustments.changes == before and adjustments.size == 2
    assert adjustments.continues_with(Sample(request, 5, 2, (9, 4)))
    assert not adjustments.continues_with(Sample(request, 5, 2, (8, 4)))
    assert not adjustments.continues_with(Sample(replace(request), 5, 2, (9, 4)))


def test_uniform_numbers_of_many_are_those_of_each() -> None:
    numbers = np.random.default_rng(7)
    seeds = [0, 2**64 - 1, *(int(seed) for seed in numbers.integers(0, 2**63, 100))]
    positions = [int(position) for position in numbers.integers(0, 10**6, len(seeds))]
    assert uniforms(seeds, positions).tolist() == [uniform(*pair) for pair in zip(seeds, positions, strict=True)]


def test_a_bundle_without_sample_graphs_is_refused(found: FoundBundle) -> None:
    steps = [graph for graph in sampler_graphs(V) if graph.kind is not GraphKind.LOGPROBS]
    device = HostDevice()
    bare = replace(found, manifest=Manifest.model_construct(graphs=tuple(steps)))
    with pytest.raises(BundleRefused, match="logprobs"):
        DeviceSampler(bare, device.allocate((1, V), DType.FLOAT32))
