"""How likely a model finds a text: the measure of what quantisation costs.

N tokens, V vocabulary. Texts are cut into windows that know nothing of each other, so that every runtime sees exactly
the same context.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from attendant.bundle import Quality
from export.errors import ExportRefused

LogitsOf = Callable[[NDArray[np.int64]], NDArray[np.float32]]


def log_likelihoods(logits: NDArray[np.float32], text: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the natural log-likelihoods [N - 1] of text[1:] under logits [N, V] of every position of `text`."""
    scores = torch.from_numpy(logits)[: len(text) - 1]
    loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(text)[1:], reduction="none")
    return -loss.double().numpy()


def text_log_likelihoods(
    logits_of: LogitsOf, text: NDArray[np.int64], *, window: int, num_tokens: int
) -> NDArray[np.float64]:
    """Return the log-likelihoods of at most `num_tokens` predictions in windows of `window` predictions each."""
    num_windows = min(num_tokens // window, (len(text) - 1) // window)
    parts = [text[start * window : (start + 1) * window + 1] for start in range(num_windows)]
    bar = tqdm(parts, desc="perplexity", unit="window", leave=False, disable=None)  # None: only on a terminal
    return np.concatenate([log_likelihoods(logits_of(part), part) for part in bar])


def compare_quality(
    reference: NDArray[np.float64], quantised: NDArray[np.float64], *, text: str, bound: float
) -> Quality:
    """Return the perplexities of two models on the same predictions, and the difference with its standard error.

    Raises:
        ExportRefused: the quantised one makes logits that are not numbers.
    """
    num_broken = int(np.isnan(quantised).sum())
    if num_broken:
        raise ExportRefused(f"the certificate failed: {num_broken} of {len(quantised)} predictions of {text} are NaN")
    loss = reference - quantised
    with np.errstate(over="ignore"):
        ratio = float(np.exp(loss.mean()))
        perplexity = float(np.exp(-quantised.mean()))
    return Quality(
        perplexity=perplexity,
        reference_perplexity=float(np.exp(-reference.mean())),
        relative_increase=ratio - 1,
        standard_error=ratio * float(loss.std(ddof=1)) / len(loss) ** 0.5,
        num_tokens=len(loss),
        text=text,
        bound=bound,
    )
