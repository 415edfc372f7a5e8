"""Multi-head attention: parity with torch, and what a past must and must not change."""

import pytest
import torch
from torch import nn

from models.attention.multihead import MultiHeadAttention
from models.attention.positions import Rotary
from models.states import Chunk, StateRule


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def chunk_of(x, lengths=None):
    return Chunk.of(x[..., 0], None if lengths is None else torch.tensor(lengths))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_it_equals_torch_multihead_attention(bias, causal):
    reference = nn.MultiheadAttention(24, 4, bias=bias, batch_first=True).double().eval()
    ours = MultiHeadAttention(24, 4, causal=causal, qkv_bias=bias, output_bias=bias).double().eval()
    with torch.no_grad():
        for linear, rows in zip((ours.query, ours.key, ours.value), reference.in_proj_weight.chunk(3), strict=True):
            linear.weight.copy_(rows)
        ours.output.weight.copy_(reference.out_proj.weight)
        if bias:
            reference.in_proj_bias.normal_()
            reference.out_proj.bias.normal_()
            for linear, rows in zip((ours.query, ours.key, ours.value), reference.in_proj_bias.chunk(3), strict=True):
                linear.bias.copy_(rows)
            ours.output.bias.copy_(reference.out_proj.bias)
    x, lengths = torch.randn(3, 7, 24, dtype=torch.float64), [7, 2, 5]
    ignored = torch.arange(7) >= torch.tensor(lengths)[:, None]  # torch's masks say what to ignore
    later = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    expected, weights = reference(
        x, x, x, key_padding_mask=ignored, attn_mask=later, need_weights=True, average_attn_weights=False
    )
    actual = ours(x, chunk_of(x, lengths), need_weights=True)
    torch.testing.assert_close(actual.output, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(actual.weights, weights, rtol=0, atol=1e-10)
    torch.testing.assert_close(ours(x, chunk_of(x, lengths)).output, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (6, 1)])
def test_grouped_queries_equal_repeated_key_value_heads(heads, kv_heads):
    grouped = MultiHeadAttention(24, heads, num_kv_heads=kv_heads, head_dim=5, causal=True).double()
    spread = MultiHeadAttention(24, heads, head_dim=5, causal=True).double()
    with torch.no_grad():
        spread.query.weight.copy_(grouped.query.weight)
        spread.output.weight.copy_(grouped.output.weight)
        for ours, theirs in ((grouped.key, spread.key), (grouped.value, spread.value)):
            repeated = ours.weight.unflatten(0, (kv_heads, 5)).repeat_interleave(heads // kv_heads, 0)
            theirs.weight.copy_(repeated.flatten(0, 1))
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(grouped(x, chunk_of(x)).output, spread(x, chunk_of(x)).output, rtol=0, atol=1e-10)


def test_without_positions_and_causality_it_is_equivariant_to_permutation():
    attention = MultiHeadAttention(24, 4).double()
    x, order = torch.randn(2, 7, 24, dtype=torch.float64), torch.randperm(7)
    output = attention(x, chunk_of(x)).output
    permuted = attention(x[:, order], chunk_of(x)).output
    torch.testing.assert_close(permuted, output[:, order], rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_of_any_content_changes_nothing(causal):
    attention = MultiHeadAttention(24, 4, causal=causal, rotary=Rotary(6)).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    expected = attention(x, chunk_of(x)).output
    padded = torch.cat((x, torch.randn(2, 4, 24, dtype=torch.float64) * 1e6), 1)
    actual = attention(padded, chunk_of(padded, [5, 5])).output[:, :5]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_three_new_tokens_after_five_equal_the_last_rows_of_one_pass():
    attention = MultiHeadAttention(24, 4, num_kv_heads=2, causal=True, rotary=Rotary(6)).double()
    x = torch.randn(2, 8, 24, dtype=torch.float64)
    whole = attention(x, chunk_of(x), need_weights=True)
    key = torch.zeros(2, 2, 10, 6, dtype=torch.float64)
    first = attention(x[:, :5], chunk_of(x[:, :5]), {"key": key, "value": key.clone()})
    later = Chunk(start=torch.tensor([5, 5]), lengths=torch.tensor([3, 3]), num_tokens=3)
    second = attention(x[:, 5:], later, first.present, need_weights=True)
    torch.testing.assert_close(second.output, whole.output[:, 5:], rtol=0, atol=1e-10)
    torch.testing.assert_close(second.weights[..., :8], whole.weights[:, :, 5:], rtol=0, atol=1e-10)
    assert (second.weights[..., 8:] == 0).all()
    assert (key == 0).all()  # a past is read, never written


def test_dropout_acts_in_training_only():
    attention = MultiHeadAttention(24, 4, dropout=0.5)
    x = torch.randn(2, 7, 24)
    assert not torch.equal(attention(x, chunk_of(x)).output, attention(x, chunk_of(x)).output)
    attention.eval()
    assert torch.equal(attention(x, chunk_of(x)).output, attention(x, chunk_of(x)).output)


def test_only_causal_attention_declares_and_accepts_a_past():
    causal, bidirectional = MultiHeadAttention(24, 4, num_kv_heads=2, causal=True), MultiHeadAttention(24, 4)
    specs = causal.state_specs()
    assert [(spec.name, spec.rule, spec.shape) for spec in specs] == [
        ("key", StateRule.APPEND, (2, "capacity", 6)),
        ("value", StateRule.APPEND, (2, "capacity", 6)),
    ]
    assert bidirectional.state_specs() == ()
    x = torch.randn(1, 3, 24)
    with pytest.raises(ValueError, match="a past needs causal attention"):
        bidirectional(x, chunk_of(x), {"key": x, "value": x})


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="d_model 24 is not a multiple of num_heads 5; give head_dim"):
        MultiHeadAttention(24, 5)
    with pytest.raises(ValueError, match="num_heads 6 is not a multiple of num_kv_heads 4"):
        MultiHeadAttention(24, 6, num_kv_heads=4)
    x = torch.randn(1, 3, 24)
    assert MultiHeadAttention(24, 5, head_dim=7)(x, chunk_of(x)).output.shape == x.shape
