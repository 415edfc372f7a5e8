"""Sliding-window attention in blocks: time and memory grow with T * window, not with T * T.

Shapes: B rows, H query heads, K key/value heads (H = K * G), T tokens, N blocks of L tokens, R tokens within reach of a
block, U shared keys, D head width, V value width.
Source: Beltagy, Peters and Cohan, Longformer, 2020, arXiv:2004.05150.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, arange

from models.attention.functional import allow, attend

BLOCK = 32  # tokens in a block at least: smaller ones cost more to handle than their masked scores


class SharedKeys(NamedTuple):
    """Keys that every query sees, wherever it stands: key (B, K, U, D), value (B, K, U, V), valid (B, U) booleans."""

    key: Tensor
    value: Tensor
    valid: Tensor


def window_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    left: int,
    right: int,
    key_valid: Tensor | None = None,
    shared: SharedKeys | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return what `attend` returns for a window of `left` keys before and `right` keys after each query and itself.

    Args:
        query: (B, H, T, D).
        key: (B, K, T, D).
        value: (B, K, T, V).
        left: how many positions before its own a query sees.
        right: how many positions after its own a query sees.
        key_valid: (B or 1, T) booleans; False hides padding.
        shared: keys that are seen beside those of the window.
        scale: 1 / sqrt(D) when None.
        dropout: probability that a weight is dropped; callers pass 0 outside training.

    Returns:
        (B, H, T, V).
    """
    rows, num_heads, num_tokens, _ = query.shape
    if num_tokens == 0:
        return query.new_zeros(rows, num_heads, 0, value.shape[-1])
    size = max(left, right, BLOCK)
    padding = -num_tokens % size
    blocks, reach = (num_tokens + padding) // size, left + size + right
    valid = torch.ones(1, num_tokens, dtype=torch.bool, device=query.device) if key_valid is None else key_valid

    def neighbourhood(x: Tensor) -> Tensor:  # (B, K, T, D) -> (B * N, K, R, D)
        return F.pad(x, (0, 0, left, right + padding)).unfold(2, reach, size).movedim(2, 1).flatten(0, 1).mT

    queries = F.pad(query, (0, 0, 0, padding)).unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1)
    keys, values = neighbourhood(key), neighbourhood(value)
    near = F.pad(valid, (left, right + padding)).unfold(1, reach, size).expand(rows, -1, -1).flatten(0, 1)  # (B * N, R)
    own = arange(left, left + size, device=query.device)[None]
    mask = allow(own, arange(reach, device=query.device)[None], left=left, right=right, key_valid=near)
    if shared is not None:
        keys = torch.cat((keys, shared.key.repeat_interleave(blocks, 0)), 2)
        values = torch.cat((values, shared.value.repeat_interleave(blocks, 0)), 2)
        seen = shared.valid.repeat_interleave(blocks, 0)[:, None, None].expand(-1, -1, size, -1)
        mask = torch.cat((mask, seen), 3)
    context, _ = attend(queries, keys, values, mask, scale=scale, dropout=dropout)
    context = context.unflatten(0, (rows, blocks)).transpose(1, 2).flatten(2, 3)  # (B, H, N * L, V)
    return context[:, :, :num_tokens]
