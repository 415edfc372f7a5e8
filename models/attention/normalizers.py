"""From scores to weights: softmax, and the normalisers that give exact zeros or a single choice.

A normaliser takes scores (..., S) and a boolean mask that broadcasts to them, True = attend, and returns weights of the
same shape and dtype that sum to 1; a slice with nothing allowed is exactly zero, with zero gradient.
"""

import math
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
    x = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    if mask is not None:
        x = x.masked_fill(~mask, -math.inf)
    if x.shape[dim] == 0:
        return x.to(scores.dtype)
    peak = x.detach().amax(dim, keepdim=True)
    peak = peak.masked_fill(peak == -math.inf, 0.0)  # -inf - -inf is NaN
    exponentials = torch.exp(x - peak)
    total = exponentials.sum(dim, keepdim=True)
    return (exponentials / total.masked_fill(total == 0.0, 1.0)).to(scores.dtype)
