"""What a bundle must show on this processor before it serves: golden replay and bitwise invariance.

The golden run (docs/bundle.md) proves that the graphs compute here what they computed for the exporter. The invariance
test proves promise P2 on the actual kernels: a row alone and among others, a prompt at once and in chunks, bit for bit.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import Check, Golden
from attendant.processor import processor_features
from service.bundle import BundleRefused, FoundBundle
from service.engine.step_graph import StepGraph

_Arrays = Mapping[str, NDArray[np.generic]]


def relative_error(measured: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return max |a - b| / max |a|, or infinity if anything is not finite."""
    difference = float(np.abs(measured.astype(np.float64) - expected).max())
    error = difference / float(np.abs(expected).max())
    return error if np.isfinite(error) else float("inf")


def check_bundle(found: FoundBundle, graph: StepGraph) -> tuple[Check, ...]:
    """Run every load-time check that fits the pools; slots are left free and their memory given back.

    Raises:
        BundleRefused: a check failed; the message says which and by how much.
    """
    golden = found.manifest.golden
    arrays = read_golden(found, golden)
    checks = [*_replay(golden, arrays, graph), *_invariance(arrays, graph)]
    for slot in range(graph.num_slots):
        graph.release(slot)
    for check in checks:
        if not check.passed:
            raise BundleRefused(f"{check.name}: {check.measured:.3g}, allowed {check.bound:.3g} ({check.grid})")
    return tuple(checks)


def read_golden(found: FoundBundle, golden: Golden) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of a bundle's golden run.

    Raises:
        BundleRefused: the file cannot be read.
    """
    try:
        with np.load(found.directory / golden.file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise BundleRefused(f"{golden.file} cannot be read: {error}") from error


def _replay(golden: Golden, arrays: _Arrays, graph: StepGraph) -> list[Check]:
    bitwise = golden.bitwise and set(golden.bitwise_on) == set(processor_features())
    text = [int(token) for token in arrays["text"]][: graph.capacity]
    logits = graph.chunk(0, text, 0, every_position=True)
    likelihood = mean_log_likelihood(logits[:-1], text[1:])
    assert golden.log_likelihood_bound is not None, "the schema demands one of a generating bundle"
    difference = abs(likelihood - float(arrays["text_log_likelihood"]))
    checks = [
        Check(
            name="golden text log-likelihood",
            measured=difference if np.isfinite(difference) else float("inf"),
            bound=golden.log_likelihood_bound,
            grid=f"{len(text)} tokens",
        )
    ]
    if golden.bitwise and not bitwise:
        return checks  # integer kernels of another processor: rounding flips move single logits by several units
    prompt = [int(token) for token in arrays["prompt"]]
    runs = [(_one_pass(graph, prompt), arrays["prompt_logits"], f"prompt of {len(prompt)} tokens")]
    ragged = _ragged(graph, arrays)
    if ragged is not None:
        runs.append((ragged, arrays["ragged_logits"], f"ragged decode {arrays['ragged_logits'].shape[:2]}"))
    for measured, expected, grid in runs:
        expected32 = np.asarray(expected, np.float32)
        if bitwise:
            error, bound = float((measured != expected32).sum()), 0.0
        else:
            error, bound = relative_error(measured, expected32), golden.bound
        checks.append(Check(name="golden replay", measured=error, bound=bound, grid=grid))
    return checks


def mean_log_likelihood(logits: NDArray[np.float32], targets: Sequence[int]) -> float:
    """Return the mean natural log-probability of `targets` [N] under `logits` [N, V]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    chosen = wide[np.arange(len(targets)), np.asarray(targets)]
    return float((chosen - np.log(np.exp(wide).sum(axis=1))).mean())


def _one_pass(graph: StepGraph, prompt: Sequence[int]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = graph.chunk(0, prompt, 0)[0]
    return logits


def _ragged(graph: StepGraph, arrays: _Arrays) -> NDArray[np.float32] | None:
    """Decode the golden rows together; None if there are fewer slots than rows."""
    lengths = [int(length) for length in arrays["ragged_lengths"]]
    if len(lengths) > graph.num_slots:
        return None
    for slot, (prompt, length) in enumerate(zip(arrays["ragged_prompts"], lengths, strict=True)):
        graph.chunk(slot, [int(token) for token in prompt[:length]], 0)
    steps = np.asarray(arrays["ragged_steps"]).T
    logits: NDArray[np.float32] = np.empty((len(steps), len(lengths), graph.vocab_size), np.float32)
    for step, tokens in enumerate(steps):
        logits[step] = graph.decode([int(token) for token in tokens], [length + step + 1 for length in lengths])
    return logits


def _invariance(arrays: _Arrays, graph: StepGraph) -> list[Check]:
    prompt = [int(token) for token in arrays["prompt"]][: graph.capacity - 1]
    whole = _one_pass(graph, prompt)
    position = 0
    for size in arrays["chunks"]:
        chunked = graph.chunk(graph.num_slots - 1, prompt[position : position + int(size)], position)[0]
        position += int(size)
    checks = [
        Check(
            name="bits that differ between one pass and chunks",
            measured=float((whole != chunked).sum()),
            bound=0.0,
            grid=f"{len(prompt)} tokens in chunks of {[int(size) for size in arrays['chunks']]}",
        )
    ]
    for slot in range(graph.num_slots - 1):
        graph.copy(graph.num_slots - 1, slot, len(prompt))
    checks += [_rows_check(graph, prompt, num_rows) for num_rows in _batch_sizes(graph.num_slots)]
    return checks


def _batch_sizes(num_slots: int) -> list[int]:
    return sorted({min(size, num_slots) for size in (2, 5, num_slots)} - {1})


def _rows_check(graph: StepGraph, prompt: list[int], num_rows: int) -> Check:
    """Compare rows of a ragged decode step with the same rows alone; every slot holds the prompt, or more."""
    lengths = [max(1, (len(prompt) * (row + 1)) // num_rows) for row in range(num_rows)]
    tokens = [prompt[(7 * row) % len(prompt)] for row in range(num_rows)]
    together = graph.decode(tokens, [length + 1 for length in lengths]).copy()
    differing = 0
    for slot in {0, num_rows // 2, num_rows - 1}:
        alone = graph.chunk(slot, [tokens[slot]], lengths[slot])[0]
        differing += int((alone != together[slot]).sum())
    return Check(
        name="bits that differ between a row alone and among others",
        measured=float(differing),
        bound=0.0,
        grid=f"{num_rows} rows of {lengths[0]} to {lengths[-1]} tokens",
    )
