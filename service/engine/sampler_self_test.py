"""What a device's sampler must show where it runs: it chooses what the host's sampler chooses."""

from collections.abc import Iterator

import numpy as np

from attendant.bundle import Check
from service.bundle import BundleRefused
from service.engine.device import Buffer
from service.engine.device_sampler import DeviceSampler
from service.engine.sampling import NotFinite, Sampler
from service.scheduling.plan import Sample
from service.scheduling.request import Request, SamplingParams, Token

DRAWS_BOUND = 0.05
"""Share of draws that may differ: a number between two tokens falls to either as a device rounds, one in thousands."""
LOGPROB_BOUND = 1e-3
"""Of log-probabilities, in nats."""
_NUM_ROWS = 16
_NUM_DRAWS = 64
_GREEDY = SamplingParams(temperature=0.0)
_DRAWS = {
    "no filters": SamplingParams(),
    "top_k": SamplingParams(top_k=40),
    "top_p": SamplingParams(top_p=0.9),
    "min_p": SamplingParams(min_p=0.02),
    "all filters": SamplingParams(temperature=0.7, top_k=100, top_p=0.95, min_p=0.001),
    "penalties and bias": SamplingParams(repetition_penalty=1.3, logit_bias=((0, 5.0), (1, -100.0))),
}


def check_sampler(sampler: DeviceSampler, logits: Buffer) -> tuple[Check, ...]:
    """Choose from rows of random logits in many ways, in `logits`, which is what `sampler` looks at.

    Raises:
        BundleRefused: a check failed; the message says which and by how much.
    """
    checks = tuple(_checks(sampler, logits))
    for check in checks:
        if not check.passed:
            raise BundleRefused(f"{check.name}: {check.measured:.3g}, allowed {check.bound:.3g} ({check.grid})")
    return checks


def _checks(sampler: DeviceSampler, logits: Buffer) -> Iterator[Check]:
    num_rows, vocab_size = min(_NUM_ROWS, logits.shape[0]), logits.shape[1]
    host, grid = Sampler(vocab_size), f"{num_rows} rows of {vocab_size} logits"
    rows = (np.random.default_rng(0).standard_normal((num_rows, vocab_size)) * 3).astype(np.float32)
    logits.device.upload(rows, logits[:num_rows])

    def choose(params: SamplingParams, start: int) -> Iterator[tuple[Token, Token]]:
        samples = [_sample(params, start + row) for row in range(num_rows)]
        for row, sample, ours in zip(rows, samples, sampler.choose(samples), strict=True):
            theirs = host.choose(row, int(row.argmax()), sample)
            yield (ours if isinstance(ours, Token) else Token(-1, np.nan)), theirs

    pairs = list(choose(_GREEDY, 0))
    yield _differing("greedy choices", pairs, 0.0, grid)
    apart = max(
        abs(one - other)
        for ours, theirs in pairs
        for one, other in zip(_logprobs(ours, theirs), _logprobs(theirs, theirs), strict=True)
    )
    error = float(apart) if np.isfinite(apart) else float("inf")
    yield Check(name="log-probabilities other than the host's", measured=error, bound=LOGPROB_BOUND, grid=grid)
    for name, params in _DRAWS.items():
        pairs = [pair for start in range(0, _NUM_DRAWS, num_rows) for pair in choose(params, start)]
        yield _differing(f"draws with {name}", pairs, DRAWS_BOUND, f"{len(pairs)} draws, {grid}")
    rows[0, -1] = np.nan
    logits.device.upload(rows, logits[:num_rows])
    outcomes = sampler.choose([_sample(_GREEDY, row) for row in range(num_rows)])
    wrong = sum(isinstance(outcome, NotFinite) != (row == 0) for row, outcome in enumerate(outcomes))
    logits.device.upload(np.zeros_like(rows), logits[:num_rows])
    yield Check(name="rows wrongly taken for finite or not", measured=float(wrong), bound=0.0, grid=grid)


def _sample(params: SamplingParams, position: int) -> Sample:
    """Return a sample at a position of its own, with the most likely token's log-probabilities if greedy."""
    request = Request(
        request_id=str(position),
        prompt=(2,),
        max_tokens=1,
        sampling=params,
        logprobs=params.is_greedy,
        top_logprobs=1 if params.is_greedy else 0,
        arrival=0.0,
    )
    return Sample(request, position, 0)


def _logprobs(token: Token, wanted: Token) -> list[float]:
    """Return what is told of a token, as much as of `wanted`."""
    told = [token.logprob, *(logprob for _, logprob in token.top)]
    told += [None] * (1 + len(wanted.top) - len(told))
    return [np.nan if logprob is None else logprob for logprob in told]


def _differing(what: str, pairs: list[tuple[Token, Token]], bound: float, grid: str) -> Check:
    share = sum(ours.token_id != theirs.token_id for ours, theirs in pairs) / len(pairs)
    return Check(name=f"{what} other than the host's", measured=share, bound=bound, grid=grid)
