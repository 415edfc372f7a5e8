"""The checks that let a bundle be written: the graph, as ONNX Runtime runs it, against the PyTorch model.

Errors are max |a - b| / max |a| over all logits of a check. A row of the KV cache holds `capacity` tokens; what is
longer is left out of a grid. An 8-bit graph is not held to a bound on logits, because one rounding flip early on moves
them by several units: its arithmetic must be exact, and the text it is asked about nearly as likely as to the model.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attendant.bundle import Certificate, Check, Quality
from export.errors import ExportRefused
from export.integers import exactness_check
from export.likelihood import compare_quality, text_log_likelihoods
from export.parts import Report
from export.runner import Runner
from export.samples import NUM_ROWS, Sample, Samples, begin
from export.text import QUALITY
from models.model import Model

PARITY_BOUND = 1e-4
GREEDY_MARGIN = 1e-3
QUALITY_BOUND = 0.015
QUALITY_TOKENS, QUALITY_WINDOW = 16_384, 512
HALF_QUALITY_BOUND, HALF_QUALITY_TOKENS = 0.002, 8192
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
    """The model without a cache: logits of every position, from the whole text."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def all_logits(self, text: Tokens, source: NDArray[Any] | None = None) -> NDArray[np.float32]:
        """Return logits [N, V] of a text [N], about a source if the model writes about one."""
        given = [torch.from_numpy(each)[None] for each in (source, text) if each is not None]
        with torch.no_grad():
            logits: NDArray[np.float32] = self._model(*given)[0].float().numpy()
        return logits


def certify(
    precision: str,
    graph: Path,
    runner: Runner,
    model: Model,
    samples: Samples,
    report: Report,
    text: Tokens | None = None,
) -> Certificate:
    """Run every check of a precision.

    Args:
        precision: "fp32" or "int8".
        graph: the step graph's file.
        runner: of that file, with at least `NUM_ROWS` rows.
        model: what was exported.
        samples: what to run it on, one for each of `NUM_ROWS` rows.
        report: takes one line for every check.
        text: token ids of the quality text, which an 8-bit graph is asked about.

    Raises:
        ExportRefused: checks failed; the message says which and by how much.
    """
    oracle = Oracle(model)
    checks = run_checks(_checks(precision, graph, runner, oracle, samples), report)
    if precision != "int8":
        return Certificate(checks=checks)
    assert text is not None, "the quality of an 8-bit graph is measured on a text"
    return Certificate(checks=checks, quality=check_quality(_quality(runner, oracle, text), report))


def half_quality(original: Model, half: Model, text: Tokens, window: int, report: Report) -> Quality:
    """Compare a decoder in half precision with its fp32 original, both in PyTorch, on the quality text.

    Args:
        original: in fp32.
        half: the same, rounded; it computes in its type.
        text: token ids of the quality text.
        window: how many tokens are predicted in one go.
        report: takes one line.

    Raises:
        ExportRefused: the text became too unlikely; the message says by how much.
    """
    reference, rounded = (
        text_log_likelihoods(
            Oracle(each).all_logits, text, window=min(QUALITY_WINDOW, window), num_tokens=HALF_QUALITY_TOKENS
        )
        for each in (original, half)
    )
    if not np.isfinite(rounded).all():
        raise ExportRefused(
            "the certificate failed: logits are not finite in half precision: an activation is too large for the type;"
            " fp16 ends at 65504, bf16 does not"
        )
    return check_quality(compare_quality(reference, rounded, text=QUALITY.name, bound=HALF_QUALITY_BOUND), report)


def check_quality(quality: Quality, report: Report) -> Quality:
    """Report what rounding cost on a text, and return it.

    Raises:
        ExportRefused: more than is allowed.
    """
    line = (
        f"perplexity on {quality.num_tokens} tokens: {quality.perplexity:.3f} against"
        f" {quality.reference_perplexity:.3f}, {quality.relative_increase:+.2%} with a standard error of"
        f" {quality.standard_error:.2%}, allowed {quality.bound:+.2%}"
    )
    report(f"  {line}")
    if not quality.relative_increase <= quality.bound:
        raise ExportRefused(f"the certificate failed: {line}")
    return quality


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


def _checks(precision: str, graph: Path, runner: Runner, oracle: Oracle, samples: Samples) -> Iterator[Check]:
    if precision == "fp32":
        yield from parity_checks(runner, oracle, samples)
    else:
        yield exactness_check(graph, samples[0].text)
    yield from invariance_checks(runner, samples)


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


def parity_checks(runner: Runner, oracle: Oracle, samples: Samples) -> Iterator[Check]:
    """Compare a float graph with the oracle over lengths, pasts, batches, single steps and sources.

    Args:
        runner: of the graph, with at least `NUM_ROWS` rows.
        oracle: of the same weights.
        samples: `NUM_ROWS` of them, with texts longer than the runner's capacity.
    """
    capacity = runner.capacity
    lengths = [length for length in _LENGTHS if length <= capacity]
    num_tokens = min(capacity, max(_LENGTHS))
    begin(runner, samples)
    expected = oracle.all_logits(samples[0].text[:num_tokens], samples[0].source)
    measured = [runner.all_logits(samples[0].text[:length]) for length in lengths]
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
    if samples[0].source is not None:
        yield _sources_check(runner, oracle, samples)
    pairs = [
        (past, new)
        for past in _PASTS
        for new in _CHUNKS
        if past + new <= num_tokens and new <= (runner.prefill_chunk or capacity)
    ]
    if pairs:
        yield Check(
            name="chunk after a past",
            measured=max(_chunk_error(runner, samples[0].text, past, new, expected) for past, new in pairs),
            bound=PARITY_BOUND,
            grid=f"1 row, (past, new tokens) in {pairs}",
        )
    steps = min(_STEPS, capacity)
    one_by_one = [runner.step(samples[0].text[None, at : at + 1], [at + 1])[0] for at in range(steps)]
    yield Check(
        name="token by token",
        measured=relative_error(np.stack(one_by_one), expected[:steps]),
        bound=PARITY_BOUND,
        grid=f"1 row, {steps} steps from an empty cache",
    )
    yield _ragged_check(runner, oracle, samples)


def invariance_checks(runner: Runner, samples: Samples) -> Iterator[Check]:
    """Count the values whose bits depend on the neighbours in a batch, or on how a prompt was cut into chunks."""
    if samples[0].source is not None:
        yield _encoded_check(runner, samples)
    if runner.prefill_chunk is None:
        yield _chunking_check(runner, samples[0])
    begin(runner, samples)
    lengths = _ragged_lengths(runner.capacity)
    differing = 0
    for num_rows in _BATCHES[1:]:
        for row in range(num_rows):
            runner.prefill(samples[row].text[: lengths[row]], row=row)
        tokens = np.array([[samples[row].text[lengths[row]]] for row in range(num_rows)])
        after = lengths[:num_rows] + 1
        together = runner.step(tokens, after, commit=False)
        for row in range(num_rows):
            alone = runner.step(tokens[row : row + 1], after[row : row + 1], first_row=row)[0]
            differing += int((alone != together[row]).sum())
    yield Check(
        name="logits that depend on neighbours",
        measured=float(differing),
        bound=0,
        grid=f"batches of {list(_BATCHES[1:])} rows of {lengths.min()} to {lengths.max()} tokens, each row also alone",
    )


def _chunking_check(runner: Runner, sample: Sample) -> Check:
    if sample.source is not None:
        for row in (0, 1):
            runner.begin(sample.source, row=row)
    length = min(runner.capacity, _CHUNKED_LENGTH) // QUERY_TILE * QUERY_TILE
    whole = runner.all_logits(sample.text[:length])
    cuts = [cut for cut in _CUTS if cut < length]
    differing = 0
    for cut in cuts:
        end = 0
        for size in chunk_sizes(length, cut):
            start, end = end, end + size
            logits = runner.step(sample.text[None, start:end], [end], np.arange(size), first_row=1)
            differing += int((logits != whole[start:end]).sum())
    return Check(
        name="logits that depend on chunking",
        measured=float(differing),
        bound=0,
        grid=f"{length} tokens in one pass and in chunks of at most {cuts}",
    )


def _encoded_check(runner: Runner, samples: Samples) -> Check:
    """Encode sources together, padded to the longest, and each alone."""
    sources = [sample.source for sample in samples]
    differing = sum(
        int((alone[name] != together[name]).sum())
        for alone, together in zip(
            (runner.encode([source])[0] for source in sources), runner.encode(sources), strict=True
        )
        for name in alone
    )
    return Check(
        name="values made of a source that depend on neighbours and padding",
        measured=float(differing),
        bound=0,
        grid=f"{len(sources)} sources of shapes {[source.shape for source in sources]}, together and each alone",
    )


def _sources_check(runner: Runner, oracle: Oracle, samples: Samples) -> Check:
    """Compare texts about sources of many lengths, with junk behind the shorter ones."""
    worst, length = 0.0, min(runner.capacity, max(_LENGTHS))
    for row, sample in enumerate(samples):
        expected = oracle.all_logits(sample.text[:length], sample.source)
        worst = max(worst, relative_error(runner.all_logits(sample.text[:length], row=row), expected))
    return Check(
        name="sources",
        measured=worst,
        bound=PARITY_BOUND,
        grid=f"{length} tokens about sources of shapes {[sample.source.shape for sample in samples]}",
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


def _ragged_check(runner: Runner, oracle: Oracle, samples: Samples) -> Check:
    """Decode rows of different lengths together and compare every row with the oracle."""
    lengths, steps, worst = _ragged_lengths(runner.capacity), 3, 0.0
    expected = [
        oracle.all_logits(sample.text[: length + steps], sample.source)[length:]
        for sample, length in zip(samples, lengths, strict=True)
    ]
    for num_rows in _BATCHES:
        for row, length in enumerate(lengths[:num_rows]):
            runner.prefill(samples[row].text[:length], row=row)
        for step in range(steps):
            tokens = [[samples[row].text[length + step]] for row, length in enumerate(lengths[:num_rows])]
            logits = runner.step(tokens, lengths[:num_rows] + step + 1)
            worst = max(worst, *(relative_error(logits[row], expected[row][step]) for row in range(num_rows)))
    return Check(
        name="ragged decode",
        measured=worst,
        bound=PARITY_BOUND,
        grid=f"{list(_BATCHES)} rows, pasts {lengths.tolist()}, {steps} forced tokens",
    )
