"""Positions: rotary, learned, sinusoidal and linear biases. All take absolute positions, so decoding and prefill agree.

Shapes: B rows, T tokens, E model width, D head width, R rotated width (R <= D), P positions.
Sources: Su et al., RoFormer, 2021, arXiv:2104.09864; Vaswani et al., 2017, arXiv:1706.03762; Press et al., Train
Short, Test Long (ALiBi), 2021, arXiv:2108.12409.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate pairs of the first R components of `x`; components beyond R pass unchanged.

    Args:
        x: (..., T, D).
        cos: (..., T, R / 2) float32, broadcastable to x.
        sin: the same.
        interleaved: pairs are (0, 1), (2, 3), ...; otherwise (0, R/2), (1, R/2 + 1), ...
    """
    rotated_dim = 2 * cos.shape[-1]
    head, tail = x[..., :rotated_dim].to(cos.dtype), x[..., rotated_dim:]
    first, second = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
    first, second = first * cos - second * sin, second * cos + first * sin
    head = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((head.to(x.dtype), tail), -1)


class Rotary(nn.Module):
    """Rotary positions of one head width; it has no parameters, and angles are float64 until their cosine."""

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        interleaved: bool = False,
        rotary_dim: int | None = None,
    ):
        super().__init__()
        self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= head_dim:
            raise ValueError(f"rotary_dim {self.rotary_dim} must be even, positive and at most head_dim {head_dim}")
        self.theta = theta
        self.interleaved = interleaved

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, float32 (..., R / 2), of every position in `positions` (...)."""
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64, device=positions.device)
        angles = positions[..., None] / self.theta ** (exponents / self.rotary_dim)
        return angles.cos().float(), angles.sin().float()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x (B, H, T, D) at positions (B or 1, T)."""
        cos, sin = self.angles(positions)
        if x.dtype == torch.float64:
            cos, sin = cos.double(), sin.double()
        return rotate(x, cos[:, None], sin[:, None], interleaved=self.interleaved)


def sinusoid(positions: Tensor, d_model: int) -> Tensor:
    """Return float32 (..., E): sin at even, cos at odd components, wavelengths from 2 pi to 20000 pi."""
    even = torch.arange(0, d_model, 2, dtype=torch.float64, device=positions.device)
    angles = positions[..., None] / 10000.0 ** (even / d_model)  # (..., ceil(E / 2))
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., :d_model].float()


class SinusoidalPositions(nn.Module):
    """Fixed sinusoids, added to token embeddings that are not rescaled."""

    def __init__(self, d_model: int):
        super().__init__()
        self.d_model = d_model

    def forward(self, positions: Tensor) -> Tensor:
        """Return (B or 1, T, E) float32 for positions (B or 1, T)."""
        return sinusoid(positions, self.d_model)


class LearnedPositions(nn.Module):
    """One learned vector for each position below `max_model_len`; `weight` is (P, E)."""

    def __init__(self, max_model_len: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_model_len, d_model))

    def forward(self, positions: Tensor) -> Tensor:
        """Return (B or 1, T, E) for positions (B or 1, T), each below P."""
        return F.embedding(positions, self.weight)


def alibi_slopes(num_heads: int) -> Tensor:
    """Return one slope for each head, float32 (H,): a geometric series if H is a power of two.

    Otherwise the series of the next lower power, followed by every other term of the next higher one.
    """
    lower = 1 << (num_heads.bit_length() - 1)
    slopes = _geometric(lower) + _geometric(2 * lower)[0::2][: num_heads - lower]
    return torch.tensor(slopes)


def _geometric(num_heads: int) -> list[float]:
    return [2.0 ** (-8.0 * (head + 1) / num_heads) for head in range(num_heads)]


def alibi_bias(slopes: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Return what distance costs: -slope * |query position - key position|, float32 (B or 1, H, T, S).

    Args:
        slopes: (H,).
        query_positions: (B or 1, T) integers.
        key_positions: (B or 1, S) integers.
    """
    distance = (query_positions[:, :, None] - key_positions[:, None, :]).abs()
    return -slopes[:, None, None] * distance[:, None]
