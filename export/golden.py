"""The golden run: what the service replays before it serves. Arrays and their meaning: docs/bundle.md."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import Golden
from attendant.processor import processor_features
from export.certificate import chunk_sizes
from export.likelihood import log_likelihoods
from export.runner import Runner
from export.samples import Samples, begin

FILE = "golden.npz"
BOUND = 1e-4
LOG_LIKELIHOOD_BOUND = {"fp32": 1e-3, "int8": 5e-2}
_NUM_ROWS, _NUM_STEPS = 4, 4
_PROMPT_LEN, _TEXT_LEN = 96, 128


def record_golden(runner: Runner, samples: Samples, precision: str, directory: Path) -> Golden:
    """Run the graph on the beginning of each sample and write golden.npz.

    Args:
        runner: with at least four rows.
        samples: with texts of at least as many tokens as a sequence may have, or 256.
        precision: of the graph; integer graphs are replayed bit for bit.
        directory: the bundle.
    """
    begin(runner, samples)
    text = samples[0].text
    prompt = text[: min(_PROMPT_LEN, (runner.capacity - _NUM_STEPS) // _NUM_ROWS * _NUM_ROWS)]
    lengths = np.array([len(prompt) * (row + 1) // _NUM_ROWS for row in range(_NUM_ROWS)])
    ragged = np.zeros((_NUM_ROWS, len(prompt)), np.int64)
    steps = np.zeros((_NUM_ROWS, _NUM_STEPS), np.int64)
    for row, length in enumerate(lengths):
        ragged[row, :length] = samples[row].text[:length]
        steps[row] = samples[row].text[length : length + _NUM_STEPS]
        runner.prefill(ragged[row, :length], row=row)
    ragged_logits = [runner.step(steps[:, [step]], lengths + step + 1) for step in range(_NUM_STEPS)]
    sample = text[: min(_TEXT_LEN, runner.capacity)]
    arrays = {
        "prompt": prompt,
        "prompt_logits": runner.prefill(prompt),
        "ragged_prompts": ragged,
        "ragged_lengths": lengths.astype(np.int64),
        "ragged_steps": steps,
        "ragged_logits": np.stack(ragged_logits),
        "text": sample,
        "text_log_likelihood": log_likelihoods(runner.all_logits(sample), sample).mean(),
    }
    if runner.prefill_chunk is None:
        arrays["chunks"] = np.array(chunk_sizes(len(prompt), len(prompt) // 2 - 1), np.int64)
    np.savez(directory / FILE, **arrays, **_sources(samples[:_NUM_ROWS]))
    return Golden(
        file=FILE,
        bound=BOUND,
        log_likelihood_bound=LOG_LIKELIHOOD_BOUND[precision],
        bitwise=precision == "int8",
        bitwise_on=processor_features(),
    )


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
