"""From scores to weights: softmax, and the normalisers that give exact zeros or a single choice.

A normaliser takes scores (..., S) and a boolean mask that broadcasts to them, True = attend, and returns weights of the
same shape and dtype that sum to 1; a slice with nothing allowed is exactly zero, with zero gradient. What lies in a
masked place, NaN included, changes nothing. Half precision is computed in float32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Normalizer(Protocol):
    """What turns scores into weights."""

    def __call__(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the weights of scores (..., S) under a mask."""


def masked_softmax(scores: Tensor, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Softmax over the allowed entries; a slice with none is exactly zero, with zero gradient.

    Half precision is computed in float32. The result has the dtype of `scores`.
    """
    x = _masked(scores, mask)
    if x.shape[dim] == 0:
        return x.to(scores.dtype)
    peak = x.detach().amax(dim, keepdim=True)
    peak = peak.masked_fill(peak == -math.inf, 0.0)  # -inf - -inf is NaN
    exponentials = torch.exp(x - peak)
    total = exponentials.sum(dim, keepdim=True)
    return (exponentials / total.masked_fill(total == 0.0, 1.0)).to(scores.dtype)


def sparsemax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the point of the simplex nearest to the scores: entries far below the best are exactly zero.

    Martins and Astudillo, From Softmax to Sparsemax, 2016, arXiv:1602.02068.
    """
    return _thresholded(scores, mask, _sparsemax)


def entmax15(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return 1.5-entmax, half-way between softmax (1) and sparsemax (2), by sorting; weak entries are exactly zero.

    Peters, Niculae and Martins, Sparse Sequence-to-Sequence Models, 2019, arXiv:1905.05702.
    """
    return _thresholded(scores, mask, _entmax15)


def hardmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Give all weight to the best score, the first of equals; no gradient flows, so this is for inference."""
    x = _masked(scores.detach(), mask)
    if x.shape[-1] == 0:
        return x.to(scores.dtype)
    peak, index = x.max(-1, keepdim=True)
    return torch.zeros_like(x).scatter(-1, index, (peak > -math.inf).to(x.dtype)).to(scores.dtype)


@dataclass(frozen=True, slots=True)
class Tempered:
    """A normaliser of scores / temperature: above 1 weights are flatter, below 1 sharper.

    Raises:
        ValueError: the temperature is not above 0.
    """

    normalizer: Normalizer
    temperature: float

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0 (hardmax is its limit)")

    def __call__(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the weights of scores (..., S) under a mask."""
        wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        return self.normalizer(wide / self.temperature, mask).to(scores.dtype)


NORMALIZERS: dict[str, Normalizer] = {
    "softmax": masked_softmax,
    "sparsemax": sparsemax,
    "entmax15": entmax15,
    "hardmax": hardmax,
}


def normalizer_named(name: str, *, temperature: float = 1.0) -> Normalizer:
    """Return the normaliser that a configuration names.

    Raises:
        ValueError: there is none of that name, or the temperature is not above 0.
    """
    if name not in NORMALIZERS:
        raise ValueError(f"normalizer is {name!r}; it must be one of {', '.join(NORMALIZERS)}")
    # Without a temperature the function itself: attention has a fused kernel for softmax as it is.
    return NORMALIZERS[name] if temperature == 1.0 else Tempered(NORMALIZERS[name], temperature)


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    x = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return x if mask is None else x.masked_fill(~mask, -math.inf)


def _thresholded(scores: Tensor, mask: Tensor | None, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `weigh` to scores relative to the best of their slice.

    The thresholds of both sparse normalisers lie at most 2 below the best score, so anything further down may stand
    for a hidden entry; with no infinity left, gradients stay finite.
    """
    x = _masked(scores, mask)
    if x.shape[-1] == 0:
        return x.to(scores.dtype)
    peak = x.detach().amax(-1, keepdim=True)
    nothing = peak == -math.inf
    weights = weigh((x - peak.masked_fill(nothing, 0.0)).clamp(min=-3.0))
    return weights.masked_fill(nothing, 0.0).to(scores.dtype)


def _sparsemax(x: Tensor) -> Tensor:
    ordered = x.sort(-1, descending=True).values
    ranks, sums = _ranks(x), ordered.cumsum(-1)
    size = (1 + ranks * ordered > sums).sum(-1, keepdim=True)  # of the support; the best score is always in it
    threshold = (sums.gather(-1, size - 1) - 1) / size
    return torch.relu(x - threshold)


def _entmax15(x: Tensor) -> Tensor:
    x = x / 2
    ordered = x.sort(-1, descending=True).values
    ranks = _ranks(x)
    mean = ordered.cumsum(-1) / ranks
    variance = ordered.square().cumsum(-1) / ranks - mean.square()
    rest = 1 / ranks - variance  # the square of how far the threshold lies below the mean of the support
    size = (mean - rest.detach().clamp(min=0.0).sqrt() <= ordered).sum(-1, keepdim=True)
    # Rooted only where it is the true support's, which makes it positive: the slope of a root at 0 is infinite.
    threshold = mean.gather(-1, size - 1) - rest.gather(-1, size - 1).sqrt()
    return torch.relu(x - threshold).square()


def _ranks(x: Tensor) -> Tensor:
    return torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
