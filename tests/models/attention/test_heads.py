"""The projections that all multi-head attention shares."""

import pytest
import torch
from torch import nn

from models.attention.heads import QK_NORM_EPS, Heads


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_heads_are_consecutive_slices_of_the_projection():
    heads = Heads(24, 4, num_kv_heads=2, d_memory=10, qkv_bias=True, output_bias=True).double()
    x, memory = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 7, 10, dtype=torch.float64)
    query, key, value = heads.queries(x), heads.keys(memory), heads.values(memory)
    assert (query.shape, key.shape, value.shape) == ((2, 4, 5, 6), (2, 2, 7, 6), (2, 2, 7, 6))
    for head in range(4):
        rows = slice(6 * head, 6 * head + 6)
        expected = x @ heads.query.weight[rows].T + heads.query.bias[rows]
        torch.testing.assert_close(query[:, head], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(key[:, 1], heads.key(memory)[..., 6:], rtol=0, atol=1e-10)
    torch.testing.assert_close(heads.merge(query), heads.output(heads.query(x)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_qk_norm_scales_every_head_to_unit_root_mean_square(dtype):
    heads = Heads(24, 4, num_kv_heads=2, qk_norm=True).to(dtype)
    for norm in (heads.query_norm, heads.key_norm):
        nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 24).to(dtype) * 3
    atol = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    for project, linear, norm, count in (
        (heads.queries, heads.query, heads.query_norm, 4),
        (heads.keys, heads.key, heads.key_norm, 2),
    ):
        plain = linear(x).unflatten(-1, (count, 6)).transpose(1, 2).double()
        expected = plain / (plain.square().mean(-1, keepdim=True) + QK_NORM_EPS).sqrt() * norm.weight.double()
        torch.testing.assert_close(project(x).double(), expected, rtol=0, atol=atol)
    # Values stay as they are, and the size of the input plays no part.
    torch.testing.assert_close(heads.values(x), heads.value(x).unflatten(-1, (2, 6)).transpose(1, 2))
    if dtype == torch.float64:
        torch.testing.assert_close(heads.queries(1000 * x), heads.queries(x), rtol=0, atol=1e-5)


def test_without_qk_norm_and_bias_there_are_no_parameters_for_them():
    names = {name for name, _ in Heads(24, 4).named_parameters()}
    assert names == {"query.weight", "key.weight", "value.weight", "output.weight"}
    names = {name for name, _ in Heads(24, 4, qkv_bias=True, qk_norm=True).named_parameters()}
    assert {"query.bias", "key.bias", "value.bias", "query_norm.weight", "key_norm.weight"} < names
    assert "output.bias" not in names
