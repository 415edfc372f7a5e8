"""Sliding-window attention in blocks: time and memory grow with T * window, not with T * T.

Shapes: B rows, H query heads, K key/value heads (H = K * G), T tokens, N blocks of L tokens, D head width, V value
width.
Source: Beltagy, Peters and Cohan, Longformer, 2020, arXiv:2004.05150.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, arange

from models.attention.functional import allow, attend


def window_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    left: int,
    right: int,
    key_valid: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return what `attend` returns for a window of `left` keys before and `right` keys after each query and itself.

    Args:
        query: (B, H, T, D).
        key: (B, K, T, D).
        value: (B, K, T, V).
        left: how many positions before its own a query sees.
        right: how many positions after its own a query sees.
        key_valid: (B or 1, T) booleans; False hides padding.
        scale: 1 / sqrt(D) when None.

    Returns:
        (B, H, T, V).
    """
    num_tokens = query.shape[2]
    size = max(left, right, 1)  # a block's window then reaches no further than its neighbours
    padding = -num_tokens % size
    valid = torch.ones(1, num_tokens, dtype=torch.bool, device=query.device) if key_valid is None else key_valid
    blocks = (num_tokens + padding) // size

    def cut(x: Tensor) -> Tensor:  # (B, H, T, D) -> (B * N, H, L, D)
        return F.pad(x, (0, 0, 0, padding)).unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1)

    before, after = size * (left > 0), size * (right > 0)

    def neighbourhood(x: Tensor) -> Tensor:  # (B, K, T, D) -> (B * N, K, before + L + after, D)
        padded = F.pad(x, (0, 0, before, padding + after))
        return padded.unfold(2, before + size + after, size).movedim(2, 1).flatten(0, 1).mT

    near = F.pad(valid, (before, padding + after)).unfold(1, before + size + after, size)  # (B or 1, N, ...)
    near = near.expand(len(query), -1, -1).flatten(0, 1)
    own = arange(size, device=query.device)[None] + before
    reach = arange(before + size + after, device=query.device)[None]
    mask = allow(own, reach, left=left, right=right, key_valid=near)
    context, _ = attend(cut(query), neighbourhood(key), neighbourhood(value), mask, scale=scale)
    context = context.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)  # (B, H, N * L, V)
    return context[:, :, :num_tokens]
