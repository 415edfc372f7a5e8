"""Sampling against a slow oracle that sorts the whole vocabulary."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.sampling import NotFinite, Sampler, uniform
from service.scheduling.plan import Sample
from service.scheduling.request import Request, SamplingParams, Token

V = 300


def choose(logits: np.ndarray, wanted: Sample, sampler: Sampler | None = None) -> Token:
    return (sampler or Sampler(len(logits))).choose(logits, int(logits.argmax()), wanted)


def sample(params: SamplingParams, position: int = 5, output: tuple[int, ...] = (), **fields: object) -> Sample:
    request = Request(request_id="r", prompt=(1, 2, 3), max_tokens=50, sampling=params, arrival=0.0, **fields)
    return Sample(request, position, len(output), output)


def oracle_distribution(logits: np.ndarray, params: SamplingParams) -> dict[int, float]:
    """The filtered distribution, by definition: most likely token first, or as it stands if nothing is filtered."""
    order = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    scaled = [(float(logits[token]) - float(logits[order[0]])) / params.temperature for token in order]
    weights = [math.exp(value) for value in scaled]
    kept = len(order)
    if params.top_k:
        kept = min(kept, params.top_k)
    total = sum(weights[:kept])
    if params.top_p < 1:
        running = 0.0
        for rank in range(kept):
            running += weights[rank]
            if running >= params.top_p * total:
                kept = rank + 1
                break
    kept = max(1, sum(weight >= params.min_p for weight in weights[:kept]))
    total = sum(weights[:kept])
    distribution = {order[rank]: weights[rank] / total for rank in range(kept)}
    filters = params.top_k in range(1, len(logits)) or params.top_p < 1 or params.min_p > 0
    return distribution if filters else dict(sorted(distribution.items()))


def oracle_draw(distribution: dict[int, float], number: float) -> tuple[int, float]:
    """The token at `number` on the cumulative sum, and how far `number` is from an edge."""
    running, edge = 0.0, 1.0
    chosen = -1
    for token, probability in distribution.items():
        running += probability
        edge = min(edge, abs(running - number))
        if chosen < 0 and number < running:
            chosen = token
    return chosen, edge


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0.5, 3.0, 10.0]),
    temperature=st.floats(0.1, 3.0),
    top_k=st.sampled_from([0, 1, 5, 40, V, 10 * V]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    position=st.integers(0, 5000),
)
def test_the_draw_is_the_one_of_the_sorted_distribution(
    seed: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float, position: int
) -> None:
    logits = (np.random.default_rng(seed).standard_normal(V) * spread).astype(np.float32)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    token = choose(logits, sample(params, position)).token_id
    expected, edge = oracle_draw(oracle_distribution(logits, params), uniform(seed, position))
    # Where the number falls on an edge of the cumulative sum, rounding may decide.
    assert token == expected or edge < 1e-5


def test_samples_follow_the_distribution() -> None:
    logits = np.array([2.0, 1.0, 0.0, -1.0, -9.0], np.float32)
    params = SamplingParams(temperature=0.7, top_p=0.97, seed=11)
    sampler = Sampler(5)
    draws = [choose(logits, sample(params, position), sampler).token_id for position in range(20_000)]
    for token, probability in oracle_distribution(logits, params).items():
        error = math.sqrt(probability * (1 - probability) / len(draws))
        assert abs(draws.count(token) / len(draws) - probability) < 4 * error


def test_uniform_numbers_are_uniform_and_depend_on_every_argument() -> None:
    numbers = np.array([uniform(seed, position) for seed in range(40) for position in range(500)])
    assert 0 <= numbers.min() < numbers.max() < 1
    counts, _ = np.histogram(numbers, 20, (0, 1))
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert chi2 < 43.8  # 99.9 % of 19 degrees of freedom
    assert len({uniform(3, 4), uniform(4, 3), uniform(3, 5), uniform(3, 4, candidate=1)}) == 4
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


def test_greedy_takes_the_most_likely_token_and_the_first_of_equals() -> None:
    logits = np.zeros(V, np.float32)
    logits[[40, 90]] = 5.0
    assert choose(logits, sample(SamplingParams(temperature=0.0))).token_id == 40


def test_a_choice_depends_on_the_row_alone() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((7, V)) * 3).astype(np.float32)
    params = SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.2, seed=4)
    wanted = sample(params, output=(9, 9, 4), logprobs=True, top_logprobs=5)
    shared = Sampler(V)
    for row in rows:
        before = row.copy()
        choose(rows[(int(row[0] * 100)) % 7], sample(params), shared)
        assert choose(row, wanted, shared) == choose(row.copy(), wanted)
        assert np.array_equal(row, before)


def test_penalties_and_bias_change_logits_as_documented() -> None:
    logits = np.array([1.0, -1.0, 0.5, 0.2, 0.0], np.float32)
    base = {"prompt": (), "arrival": 0.0, "max_tokens": 9}

    def best(params: SamplingParams, output: tuple[int, ...]) -> int:
        request = Request(request_id="r", sampling=params, **base)
        return choose(logits, Sample(request, 0, len(output), output)).token_id

    assert best(SamplingParams(temperature=0, repetition_penalty=3.0), (0,)) == 2
    assert best(SamplingParams(temperature=0, presence_penalty=0.4), (0,)) == 0
    assert best(SamplingParams(temperature=0, presence_penalty=0.6), (0, 0)) == 2
    assert best(SamplingParams(temperature=0, frequency_penalty=0.3), (0, 0)) == 2
    assert best(SamplingParams(temperature=0, logit_bias=((4, 3.0), (0, -100.0))), ()) == 4
    # A negative logit is multiplied: dividing would reward repetition.
    reward = SamplingParams(temperature=0, repetition_penalty=0.1)
    assert best(reward, (1,)) == 0


def test_end_tokens_are_suppressed_until_min_tokens() -> None:
    logits = np.array([5.0, 4.0, 3.0], np.float32)
    params = SamplingParams(temperature=0.0)
    fields = {"min_tokens": 2, "eos_token_ids": frozenset({0}), "stop_token_ids": frozenset({1})}
    assert choose(logits, sample(params, **fields)).token_id == 2
    assert choose(logits, sample(params, output=(2, 2), **fields)).token_id == 0


def test_logprobs_are_those_of_the_unmodified_distribution() -> None:
    logits = (np.random.default_rng(1).standard_normal(V) * 2).astype(np.float32)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    params = SamplingParams(temperature=0.5, top_k=3, logit_bias=((7, 50.0),), seed=1)
    token = choose(logits, sample(params, logprobs=True, top_logprobs=4))
    assert token.token_id == 7
    assert token.logprob == pytest.approx(exact[7], abs=1e-5)
    best = np.argsort(-exact)[:4]
    assert [other for other, _ in token.top] == best.tolist()
    assert [logprob for _, logprob in token.top] == pytest.approx(exact[best].tolist(), abs=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    logits = np.zeros(V, np.float32)
    logits[17] = value
    with pytest.raises(NotFinite):
        choose(logits, sample(SamplingParams()))
