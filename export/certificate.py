"""The checks that let a bundle be written: the graph, as ONNX Runtime runs it, against the PyTorch decoder.

Errors are max |a - b| / max |a| over all logits of a check. A row of the KV cache holds `capacity` tokens; what is
longer is left out of a grid. An 8-bit graph is not held to a bound on logits, because one rounding flip early on moves
them by several units: its arithmetic must be exact, and the text it is asked about nearly as likely as to the decoder.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from attendant.bundle import Certificate, Check, Quality
from export.errors import ExportRefused
from export.integers import exactness_check
from export.likelihood import compare_quality, text_log_likelihoods
from export.parts import Report
from export.runner import Runner
from export.text import QUALITY
from models.decoder import Decoder

PARITY_BOUND = 1e-4
GREEDY_MARGIN = 1e-3
QUALITY_BOUND = 0.015
QUALITY_TOKENS, QUALITY_WINDOW = 16_384, 512
NUM_ROWS = 8
_LENGTHS = (2, 3, 17, 64, 191)
_PASTS = (1, 2, 16, 63, 128)
_CHUNKS = (2, 5, 32)
_BATCHES = (1, 2, 5, 8)
_STEPS = 24
QUERY_TILE = 16
_CHUNKED_LENGTH = 320
_CUTS = (3, 16, 31, 33, 50, 64, 129, 256)

Tokens = NDArray[np.int64]


class Oracle:
    """The decoder without a cache: logits of every position, from the whole text."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def all_logits(self, text: Tokens) -> NDArray[np.float32]:
        """Return logits [N, V] of a text [N]."""
        with torch.no_grad():
            return self._decoder(torch.from_numpy(text)[None])[0].numpy()


def certify(precision: str, graph: Path, runner: Runner, decoder: Decoder, text: Tokens, report: Report) -> Certificate:
    """Run every check of a precision.

    Args:
        precision: "fp32" or "int8".
        graph: the file.
        runner: of that file, with at least `NUM_ROWS` rows.
        decoder: what was exported.
        text: token ids of the quality text.
        report: takes one line for every check.

    Raises:
        ExportRefused: checks failed; the message says which and by how much.
    """
    oracle = Oracle(decoder)
    checks = run_checks(_checks(precision, graph, runner, oracle, text), report)
    if precision != "int8":
        return Certificate(checks=checks)
    quality = _quality(runner, oracle, text)
    line = (
        f"perplexity on {quality.num_tokens} tokens: {quality.perplexity:.3f} against"
        f" {quality.reference_perplexity:.3f}, {quality.relative_increase:+.2%} with a standard error of"
        f" {quality.standard_error:.2%}, allowed {quality.bound:+.2%}"
    )
    report(f"  {line}")
    if not quality.relative_increase <= quality.bound:
        raise ExportRefused(f"the certificate failed: {line}")
    return Certificate(checks=checks, quality=quality)


def run_checks(checks: Iterable[Check], report: Report) -> tuple[Check, ...]:
    """Make every check, report each, and return them.

    Raises:
        ExportRefused: some failed; the message says which and by how much.
    """
    made, failures = [], []
    for check in checks:
        line = f"{check.name}: {check.measured:.3g}, allowed {check.bound:g} ({check.grid})"
        report(f"  {line}")
        made.append(check)
        if not check.passed:
            failures.append(line)
    if failures:
        raise ExportRefused("the certificate failed: " + "; ".join(failures))
    return tuple(made)


def _checks(precision: str, graph: Path, runner: Runner, oracle: Oracle, text: Tokens) -> Iterator[Check]:
    if precision == "fp32":
        yield from parity_checks(runner, oracle, text)
    else:
        yield exactness_check(graph, text)
    yield from invariance_checks(runner, text)


def _quality(runner: Runner, oracle: Oracle, text: Tokens) -> Quality:
    window = min(QUALITY_WINDOW, runner.capacity - 1)
    reference, quantised = (
        text_log_likelihoods(each.all_logits, text, window=window, num_tokens=QUALITY_TOKENS)
        for each in (oracle, runner)
    )
    return compare_quality(reference, quantised, text=QUALITY.name, bound=QUALITY_BOUND)


def relative_error(measured: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return max |a - b| / max |a|, or infinity where anything is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(measured - expected).max() / np.abs(expected).max()
    return float(error) if np.isfinite(error) else float("inf")


def parity_checks(runner: Runner, oracle: Oracle, text: Tokens) -> Iterator[Check]:
    """Compare a float graph with the oracle over lengths, pasts, batches and single steps.

    Args:
        runner: of the graph, with at least `NUM_ROWS` rows.
        oracle: of the same weights.
        text: token ids, longer than the runner's capacity plus `NUM_ROWS`.
    """
    capacity = runner.capacity
    lengths = [length for length in _LENGTHS if length <= capacity]
    expected = oracle.all_logits(text[: min(capacity, max(_LENGTHS))])
    measured = [runner.all_logits(text[:length]) for length in lengths]
    yield Check(
        name="one pass",
        measured=max(relative_error(logits, expected[: len(logits)]) for logits in measured),
        bound=PARITY_BOUND,
        grid=f"1 row, {lengths} new tokens, no past",
    )
    top = np.sort(expected, axis=1)[:, -2:]
    decided = (top[:, 1] - top[:, 0] > GREEDY_MARGIN)[: lengths[-1]]
    differs = measured[-1].argmax(1) != expected[: lengths[-1]].argmax(1)
    yield Check(
        name="greedy tokens that differ",
        measured=float((differs & decided).sum()),
        bound=0,
        grid=f"{decided.sum()} positions where the best token leads by more than {GREEDY_MARGIN:g}",
    )
    pairs = [(past, new) for past in _PASTS for new in _CHUNKS if past + new <= min(capacity, len(expected))]
    yield Check(
        name="chunk after a past",
        measured=max((_chunk_error(runner, text, past, new, expected) for past, new in pairs), default=0.0),
        bound=PARITY_BOUND,
        grid=f"1 row, (past, new tokens) in {pairs}",
    )
    steps = min(_STEPS, capacity)
    one_by_one = [runner.step(text[None, at : at + 1], [at + 1])[0] for at in range(steps)]
    yield Check(
        name="token by token",
        measured=relative_error(np.stack(one_by_one), expected[:steps]),
        bound=PARITY_BOUND,
        grid=f"1 row, {steps} steps from an empty cache",
    )
    yield _ragged_check(runner, oracle, text)


def invariance_checks(runner: Runner, text: Tokens) -> Iterator[Check]:
    """Count the logits whose bits depend on the neighbours in a batch, or on how a prompt was cut into chunks."""
    length = min(runner.capacity, _CHUNKED_LENGTH) // QUERY_TILE * QUERY_TILE
    whole = runner.all_logits(text[:length])
    cuts = [cut for cut in _CUTS if cut < length]
    differing = 0
    for cut in cuts:
        end = 0
        for size in chunk_sizes(length, cut):
            start, end = end, end + size
            logits = runner.step(text[None, start:end], [end], np.arange(size), first_row=1)
            differing += int((logits != whole[start:end]).sum())
    yield Check(
        name="logits that depend on chunking",
        measured=float(differing),
        bound=0,
        grid=f"{length} tokens in one pass and in chunks of at most {cuts}",
    )
    lengths = _ragged_lengths(runner.capacity)
    differing = 0
    for num_rows in _BATCHES[1:]:
        for row in range(num_rows):
            runner.prefill(text[row : row + lengths[row]], row=row)
        tokens, after = text[:num_rows, None], lengths[:num_rows] + 1
        together = runner.step(tokens, after)
        for row in range(num_rows):
            alone = runner.step(tokens[row : row + 1], after[row : row + 1], first_row=row)[0]
            differing += int((alone != together[row]).sum())
    yield Check(
        name="logits that depend on neighbours",
        measured=float(differing),
        bound=0,
        grid=f"batches of {list(_BATCHES[1:])} rows of {lengths.min()} to {lengths.max()} tokens, each row also alone",
    )


def chunk_sizes(length: int, limit: int) -> list[int]:
    """Cut `length` tokens, at least two, into chunks of at most `limit`, three or more, that change no bit of a result.

    Attention takes the queries of a chunk in tiles of a multiple of `QUERY_TILE`, and sums a tile of one query with
    another kernel. So no chunk may leave one query over; one token is the simplest case.
    """
    sizes = []
    while length:
        size = min(length, limit)
        while size % QUERY_TILE == 1 or length - size == 1:
            size -= 1
        sizes.append(size)
        length -= size
    return sizes


def _chunk_error(runner: Runner, text: Tokens, past: int, new: int, expected: NDArray[np.float32]) -> float:
    runner.prefill(text[:past])
    logits = runner.step(text[None, past : past + new], [past + new], np.arange(new))
    return relative_error(logits, expected[past : past + new])


def _ragged_lengths(capacity: int) -> Tokens:
    """Return `NUM_ROWS` different past lengths that leave room for three more tokens."""
    longest = min(capacity - 3, max(_LENGTHS) - 3)
    return np.unique(np.linspace(1, longest, NUM_ROWS).astype(np.int64))[::-1].copy()


def _ragged_check(runner: Runner, oracle: Oracle, text: Tokens) -> Check:
    """Decode rows of different lengths together and compare every row with the oracle."""
    lengths, steps, worst = _ragged_lengths(runner.capacity), 3, 0.0
    expected = [oracle.all_logits(text[row : row + length + steps])[length:] for row, length in enumerate(lengths)]
    for num_rows in _BATCHES:
        for row, length in enumerate(lengths[:num_rows]):
            runner.prefill(text[row : row + length], row=row)
        for step in range(steps):
            tokens = [[text[row + length + step]] for row, length in enumerate(lengths[:num_rows])]
            logits = runner.step(tokens, lengths[:num_rows] + step + 1)
            worst = max(worst, *(relative_error(logits[row], expected[row][step]) for row in range(num_rows)))
    return Check(
        name="ragged decode",
        measured=worst,
        bound=PARITY_BOUND,
        grid=f"{list(_BATCHES)} rows, pasts {lengths.tolist()}, {steps} forced tokens",
    )
