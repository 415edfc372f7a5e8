"""The golden run: what the service replays before it serves. Arrays and their meaning: docs/bundle.md."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import Golden
from attendant.processor import processor_features
from export.certificate import Oracle, chunk_sizes, relative_error
from export.errors import ExportRefused
from export.likelihood import log_likelihoods
from export.runner import Runner
from export.samples import Samples, begin

FILE = "golden.npz"
BOUND = 1e-4
LOG_LIKELIHOOD_BOUND = {"fp32": 1e-3, "int8": 5e-2}
_NUM_ROWS, _NUM_STEPS = 4, 4
_PROMPT_LEN, _TEXT_LEN = 96, 128
# Of half graphs: what the rounding of PyTorch's own half-precision run amounts to, times this. Other kernels round as
# often but elsewhere, and add in another order. A wrong graph errs by about 1.
HALF_MARGIN = 4
_LARGEST_HALF_BOUND = 0.5


class _Inputs(NamedTuple):
    """What a golden run is given: one prompt, rows of prompts with forced tokens behind them, and a text."""

    prompt: NDArray[np.int64]
    ragged: NDArray[np.int64]
    lengths: NDArray[np.int64]
    steps: NDArray[np.int64]
    text: NDArray[np.int64]


def record_golden(runner: Runner, samples: Samples, precision: str, directory: Path) -> Golden:
    """Run the graph on the beginning of each sample and write golden.npz.

    Args:
        runner: with at least four rows.
        samples: with texts of at least as many tokens as a sequence may have, or 256.
        precision: of the graph; integer graphs are replayed bit for bit.
        directory: the bundle.
    """
    begin(runner, samples)
    given = _choose(samples, runner.capacity)
    for row, length in enumerate(given.lengths):
        runner.prefill(given.ragged[row, :length], row=row)
    ragged_logits = [runner.step(given.steps[:, [step]], given.lengths + step + 1) for step in range(_NUM_STEPS)]
    results = {
        "prompt_logits": runner.prefill(given.prompt),
        "ragged_logits": np.stack(ragged_logits),
        "text_log_likelihood": log_likelihoods(runner.all_logits(given.text), given.text).mean(),
    }
    _write(directory, given, results, _sources(samples[:_NUM_ROWS]), in_chunks=runner.prefill_chunk is None)
    return Golden(
        file=FILE,
        bound=BOUND,
        log_likelihood_bound=LOG_LIKELIHOOD_BOUND[precision],
        bitwise=precision == "int8",
        bitwise_on=processor_features(),
    )


def record_half_golden(wide: Oracle, half: Oracle, samples: Samples, capacity: int, directory: Path) -> Golden:
    """Write golden.npz for a half graph, of which no processor here can tell the logits to the bit.

    It holds what PyTorch computes in float32 from the rounded weights, which the graph's fp32 twin was compared with.
    The bounds are `HALF_MARGIN` times what PyTorch's run in the half type differs from that on the same inputs.

    Args:
        wide: the rounded decoder in float32.
        half: the same in the half type.
        samples: with texts of at least `capacity` tokens.
        capacity: tokens that a sequence may have.
        directory: the bundle.

    Raises:
        ExportRefused: the half type rounds so coarsely that a replay would prove nothing.
    """
    given = _choose(samples, capacity)
    expected, measured = (_of_oracle(oracle, given) for oracle in (wide, half))
    text, rounded_text = (oracle.all_logits(given.text) for oracle in (wide, half))
    # The whole text, too: single positions err several times as much as most, and which they are is chance.
    errors = [relative_error(rounded_text, text)]
    errors += [relative_error(measured[name], expected[name]) for name in expected]
    bound = HALF_MARGIN * max(errors)
    if not bound <= _LARGEST_HALF_BOUND:
        raise ExportRefused(
            f"the half type moves logits by {max(errors):.2g} of the largest: a golden run proves nothing beyond"
            f" {_LARGEST_HALF_BOUND / HALF_MARGIN:g}"
        )
    # Gains and losses of single tokens cancel in the mean by chance: their spread is allowed for.
    likelihoods = log_likelihoods(text, given.text)
    moved = log_likelihoods(rounded_text, given.text) - likelihoods
    log_likelihood_bound = HALF_MARGIN * float(abs(moved.mean()) + moved.std() / len(moved) ** 0.5)
    _write(directory, given, expected | {"text_log_likelihood": likelihoods.mean()}, {}, in_chunks=True)
    return Golden(
        file=FILE,
        bound=bound,
        log_likelihood_bound=log_likelihood_bound,
        bitwise=False,
        bitwise_on=processor_features(),
    )


def _choose(samples: Samples, capacity: int) -> _Inputs:
    text = samples[0].text
    prompt = text[: min(_PROMPT_LEN, (capacity - _NUM_STEPS) // _NUM_ROWS * _NUM_ROWS)]
    lengths = np.array([len(prompt) * (row + 1) // _NUM_ROWS for row in range(_NUM_ROWS)], np.int64)
    ragged = np.zeros((_NUM_ROWS, len(prompt)), np.int64)
    steps = np.zeros((_NUM_ROWS, _NUM_STEPS), np.int64)
    for row, length in enumerate(lengths):
        ragged[row, :length] = samples[row].text[:length]
        steps[row] = samples[row].text[length : length + _NUM_STEPS]
    return _Inputs(prompt, ragged, lengths, steps, text[: min(_TEXT_LEN, capacity)])


def _of_oracle(oracle: Oracle, given: _Inputs) -> dict[str, NDArray[np.float32]]:
    """Return the logits behind the prompt and behind each forced token."""
    ragged_logits = [
        oracle.all_logits(np.concatenate((prompt[:length], steps)))[length:]
        for prompt, length, steps in zip(given.ragged, given.lengths, given.steps, strict=True)
    ]
    return {
        "prompt_logits": oracle.all_logits(given.prompt)[-1],
        "ragged_logits": np.stack(ragged_logits, axis=1),
    }


def _write(
    directory: Path, given: _Inputs, results: dict[str, Any], sources: dict[str, NDArray[Any]], *, in_chunks: bool
) -> None:
    arrays = {
        "prompt": given.prompt,
        "ragged_prompts": given.ragged,
        "ragged_lengths": given.lengths,
        "ragged_steps": given.steps,
        "text": given.text,
    }
    if in_chunks:
        length = len(given.prompt)
        arrays["chunks"] = np.array(chunk_sizes(length, length // 2 - 1), np.int64)
    np.savez(directory / FILE, **arrays, **results, **sources)


def _sources(samples: Samples) -> dict[str, NDArray[Any]]:
    """Return the arrays that say what the rows are about."""
    sources = [sample.source for sample in samples if sample.source is not None]
    if not sources:
        return {}
    if sources[0].ndim > 1:
        return {"source": sources[0], "ragged_sources": np.stack(sources)}
    lengths = np.array([len(source) for source in sources])
    ragged = np.zeros((len(sources), lengths.max()), np.int64)
    for row, source in enumerate(sources):
        ragged[row, : len(source)] = source
    return {"source": sources[0], "ragged_sources": ragged, "ragged_source_lengths": lengths}
