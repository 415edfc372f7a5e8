"""ONNX Runtime's own operators, as calls that `torch.onnx.export` records.

They compute nothing in PyTorch (their results are zeros): the exported graph is compared with the oracle instead.
Sizes: N query heads, K key/value heads, D head width, B rows, S new tokens, T = B * S, M capacity.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.onnx.ops import symbolic, symbolic_multi_out

OPSET = 23


def group_query_attention(
    query_key_value: Tensor,
    past: tuple[Tensor, Tensor],
    last_position: Tensor,
    total_length: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    rotary_interleaved: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of each row's new tokens over its past, which it extends in place.

    Args:
        query_key_value: [B, S, (N + 2K) * D], queries, keys and values side by side.
        past: keys and values [B, K, M, D]; bound to the same memory as the results.
        last_position: int32 [B], index of each row's last valid position after this step.
        total_length: int32 [], the capacity M.
        rotation: cosines and sines [positions, D / 2], or None where positions are not rotary.
        num_heads: N.
        num_kv_heads: K.
        rotary_interleaved: whether dimensions (2i, 2i + 1) turn together, rather than (i, i + D / 2).
        window: how many tokens each sees, itself included; None is no limit.

    Returns:
        Context [B, S, N * D], and the extended keys and values.
    """
    rows, tokens, width = query_key_value.shape
    head_dim = past[0].shape[3]
    assert width == (num_heads + 2 * num_kv_heads) * head_dim, (width, num_heads, num_kv_heads, head_dim)
    context, key, value = symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (query_key_value, None, None, *past, last_position, total_length, *(rotation or ())),
        {
            "num_heads": num_heads,
            "kv_num_heads": num_kv_heads,
            "do_rotary": int(rotation is not None),
            "rotary_interleaved": int(rotary_interleaved),
            "local_window_size": -1 if window is None else window,
        },
        dtypes=(query_key_value.dtype, past[0].dtype, past[1].dtype),
        shapes=((rows, tokens, num_heads * head_dim), past[0].shape, past[1].shape),
        version=1,
    )
    return context, key, value


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, num_heads: int) -> Tensor:
    """Attend without a past: the standard operator of opset 23.

    Args:
        query: [B, S, N * D], heads side by side.
        key: the same.
        value: the same.
        mask: [B, 1, S, S], added to the scores. A boolean one the operator would turn into this in every layer.
        num_heads: N.

    Returns:
        Context [B, S, N * D].
    """
    return symbolic(
        "Attention",
        (query, key, value, mask),
        {"q_num_heads": num_heads, "kv_num_heads": num_heads},
        dtype=query.dtype,
        shape=query.shape,
        version=OPSET,
    )


def rotate(values: Tensor, cosines: Tensor, sines: Tensor, *, num_heads: int) -> Tensor:
    """Turn the halves of every head of [B, S, N * D] by the angles whose cosines and sines are [B, S, D / 2]."""
    return symbolic(
        "RotaryEmbedding",
        (values, cosines, sines),
        {"num_heads": num_heads, "interleaved": 0},
        dtype=values.dtype,
        shape=values.shape,
        version=OPSET,
    )


def cross_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attend to a source: the standard operator of opset 23.

    Args:
        query: [B, N, S, D].
        key: [B, K, source, D].
        value: the same.
        mask: boolean [B, 1, S, source], true = attend; None where all of a source is real.

    Returns:
        Context [B, N, S, D].
    """
    given = (query, key, value) if mask is None else (query, key, value, mask)
    return symbolic("Attention", given, {}, dtype=query.dtype, shape=query.shape, version=OPSET)


def add(left: Tensor, right: Tensor) -> Tensor:
    """Add two tensors [T, E], the second broadcast to the first, so that ONNX Runtime leaves the sum alone.

    It fuses Add with the layer norm or GELU behind it, and its fused layer norm takes six times as long as the two
    steps, its fused GELU a quarter longer. It does not look through a Reshape, which costs nothing.
    """
    total = symbolic("Add", (left, right), {}, dtype=left.dtype, shape=left.shape, version=OPSET)
    shape = torch.tensor([0, left.shape[-1]])  # 0: the number of rows as it is
    return symbolic("Reshape", (total, shape), {}, dtype=left.dtype, shape=left.shape, version=OPSET)


def norm(hidden: Tensor, gain: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise the rows of [T, E]: an RMS norm without `bias`, a layer norm with it. All weights are [E]."""
    simplified = bias is None
    return symbolic(
        "RMSNormalization" if simplified else "LayerNormalization",
        (hidden, gain) if simplified else (hidden, gain, bias),
        {"axis": -1, "epsilon": eps},
        dtype=hidden.dtype,
        shape=hidden.shape,
        version=OPSET,
    )


def skip_norm(hidden: Tensor, skip: Tensor, gain: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Add two [T, E] and normalise the sum: an RMS norm without `bias`, in one pass, or a layer norm with it.

    Returns:
        The normalised sum and the sum.
    """
    if bias is not None:
        total = add(hidden, skip)
        return norm(total, gain, bias, eps), total
    # All four results are declared, though the middle two are for training: ONNX Runtime warns otherwise.
    statistics = (*hidden.shape[:-1], 1)
    normalised, _, _, total = symbolic_multi_out(
        "com.microsoft::SkipSimplifiedLayerNormalization",
        (hidden, skip, gain),
        {"epsilon": eps},
        dtypes=(hidden.dtype, torch.float32, torch.float32, hidden.dtype),
        shapes=(hidden.shape, statistics, statistics, hidden.shape),
        version=1,
    )
    return normalised, total


def silu(gate: Tensor) -> Tensor:
    """Return gate * sigmoid(gate), elementwise."""
    return symbolic("com.microsoft::QuickGelu", (gate,), {"alpha": 1.0}, dtype=gate.dtype, shape=gate.shape, version=1)


def quantise_linear(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return round(values / scale) + zero_point as uint8, clipped; scale and zero point are [] or one per row [T]."""
    return symbolic(
        "QuantizeLinear",
        (values, scale, zero_point),
        {"axis": 0},
        dtype=torch.uint8,
        shape=values.shape,
        version=OPSET,
    )


def integer_matmul(
    codes: Tensor, weight: Tensor, scales: Sequence[Tensor], zero_point: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Multiply uint8 codes [T, in] by int8 weights [in, out]: exact integer sums, then the scales, then the bias.

    Args:
        codes: uint8 [T, in].
        weight: int8 [in, out].
        scales: of the codes, [], and of each output of the weights, [out].
        zero_point: uint8 [], the code that stands for zero.
        bias: [out].
    """
    return symbolic(
        "com.microsoft::MatMulIntegerToFloat",
        (codes, weight, *scales, zero_point) if bias is None else (codes, weight, *scales, zero_point, None, bias),
        {},
        dtype=torch.float32,
        shape=(*codes.shape[:-1], weight.shape[1]),
        version=1,
    )
