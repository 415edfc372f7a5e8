"""Norms and feed-forward blocks.

Shapes: x is (..., E); the hidden layer of a feed-forward block is (..., F).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class RMSNorm(nn.Module):
    """Scale by the root mean square, computed in float32. Zhang and Sennrich, 2019, arXiv:1910.07467."""

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., E)."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


LayerNorm = nn.LayerNorm
NORMS: dict[str, type[RMSNorm] | type[nn.LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}


class FeedForward(nn.Module):
    """Two linear layers around an activation; "swiglu" adds a gate (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, d_model: int, d_ff: int, activation: str, *, bias: bool):
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.gate = nn.Linear(d_model, d_ff, bias=bias) if activation == "swiglu" else None
        self.down = nn.Linear(d_ff, d_model, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., E) to (..., E)."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))
