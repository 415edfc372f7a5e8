"""Attention as pure functions, so that training, export and tests share one definition.

Shapes: B rows, H query heads, K key/value heads (H = K * G), T queries, S keys, D head width, V value width.
Masks are boolean, True = attend, broadcastable to (B, H, T, S). Source: Vaswani et al., Attention Is All You
Need, 2017, arXiv:1706.03762; grouped queries: Ainslie et al., 2023, arXiv:2305.13245.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.normalizers import Normalizer, masked_softmax


def allow(
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    causal: bool = False,
    left: int | None = None,
    right: int | None = None,
    key_valid: Tensor | None = None,
) -> Tensor:
    """Build a mask from absolute positions: the only place where masks are made, so offsets cannot disagree.

    Args:
        query_positions: (B or 1, T) integers.
        key_positions: (B or 1, S) integers.
        causal: keys later than the query are hidden.
        left: how many positions before its own a query sees; None is all.
        right: how many positions after its own a query sees; None is all.
        key_valid: (B or 1, S) booleans; False hides padding and empty slots.

    Returns:
        (B or 1, 1, T, S) booleans, True = attend.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]  # (B, T, S), positive = key lies before
    mask = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        mask &= distance >= 0
    if left is not None:
        mask &= distance <= left
    if right is not None:
        mask &= distance >= -right
    if key_valid is not None:
        mask = mask & key_valid[:, None, :]
    return mask[:, None]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    normalizer: Normalizer = masked_softmax,
    dropout: float = 0.0,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention: softmax(query key^T * scale + bias) value, for grouped queries as well.

    Query head h reads key/value head h // G; keys and values are never repeated in memory. Keys that the mask
    hides from every query may hold anything, NaN included.

    Args:
        query: (B, H, T, D).
        key: (B, K, S, D).
        value: (B, K, S, V).
        mask: boolean, broadcastable to (B, H, T, S).
        bias: floating point, added to the scaled scores, broadcastable to (B, H, T, S).
        scale: 1 / sqrt(D) when None.
        softcap: scaled scores x become softcap * tanh(x / softcap) before bias and mask are applied.
        normalizer: turns scores and mask into weights.
        dropout: probability that a weight is dropped after it was normalised; callers pass 0 outside training.
        need_weights: also return the weights, before dropout.

    Returns:
        (B, H, T, V), and the weights (B, H, T, S) or None.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: shapes disagree, H is not a multiple of K, or softcap is not above 0.
    """
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be above 0")
    _check_shapes(query, key, value, mask)
    rows, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    if num_keys == 0 or num_queries == 0:
        weights = query.new_zeros(rows, num_heads, num_queries, num_keys) if need_weights else None
        return query.new_zeros(rows, num_heads, num_queries, value.shape[-1]), weights
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    groups = num_heads // num_kv_heads
    full = (rows, num_heads, num_queries, num_keys)
    # The G query heads of a key/value head become further queries of that head: no copies of keys and values.
    query = query.reshape(rows, num_kv_heads, groups * num_queries, head_dim)
    if mask is not None:
        reachable = mask.expand(*(1,) * (4 - mask.dim()), *mask.shape).any(-2)  # (B or 1, H or 1, S or 1)
        key, value = _hide(key, value, reachable, num_kv_heads)
        mask = _group(mask, full, num_kv_heads)
    if bias is None and softcap is None and normalizer is masked_softmax and not need_weights:
        output = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
        return output.reshape(*full[:3], value.shape[-1]), None
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half:  # products of half-precision vectors overflow before they are scaled
        query, key = query.float(), key.float()
    scores = (query * scale) @ key.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + _group(bias, full, num_kv_heads)
    weights = normalizer(scores, mask).to(value.dtype)
    output = F.dropout(weights, dropout) @ value
    return output.reshape(*full[:3], value.shape[-1]), weights.reshape(full) if need_weights else None


def attend_causally(
    query: Tensor, key: Tensor, value: Tensor, *, key_valid: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Return what `attend` returns where query t sees keys 0..t: in half its time, with no mask in memory.

    Queries and keys are of the same tokens, so that both ends of the mask agree. Padding comes after what is valid, so
    no valid query sees it; what padding itself reads means nothing.

    Args:
        query: (B, H, T, D).
        key: (B, K, T, D).
        value: (B, K, T, V).
        key_valid: (B or 1, T) booleans; padding, where it is False, may hold anything, NaN included.
        dropout: probability that a weight is dropped; callers pass 0 outside training.

    Returns:
        (B, H, T, V).
    """
    if key_valid is not None:
        hidden = ~key_valid[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=True)


def entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of each distribution over the last axis; 0 for a one-hot or an all-zero row."""
    # 1 has the entropy of 0, and a finite slope, which training on entropy needs.
    return torch.special.entr(weights.double().masked_fill(weights == 0.0, 1.0)).sum(-1).to(weights.dtype)


def _group(tensor: Tensor, full: tuple[int, int, int, int], num_kv_heads: int) -> Tensor:
    """Shape a mask or bias for folded queries: (B or 1, K or 1, G * T, S), without copies where G is 1."""
    _, num_heads, num_queries, num_keys = full
    groups = num_heads // num_kv_heads
    tensor = tensor.expand(*(1,) * (4 - tensor.dim()), *tensor.shape)
    per_head = tensor.shape[1] != 1
    tensor = tensor.expand(tensor.shape[0], num_heads if per_head else groups, num_queries, num_keys)
    return tensor.reshape(tensor.shape[0], num_kv_heads if per_head else 1, groups * num_queries, num_keys)


def _hide(key: Tensor, value: Tensor, reachable: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """Zero keys and values that no query may read: 0 * NaN is NaN, so an unused slot would leak otherwise."""
    if reachable.shape[1] != 1:
        reachable = reachable.reshape(reachable.shape[0], num_kv_heads, -1, reachable.shape[-1]).any(2)
    hidden = ~reachable[..., None]
    return key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}; give booleans, True = attend, and pass additive masks as bias")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query head width {query.shape[-1]} differs from key head width {key.shape[-1]}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"keys {tuple(key.shape[:3])} and values {tuple(value.shape[:3])} differ in rows, heads or length"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"num_heads {query.shape[1]} is not a multiple of num_kv_heads {key.shape[1]}")
