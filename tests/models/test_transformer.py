"""The layer that stacks are made of: parity with torch for both orders of norms, and what it asks of its parts."""

import math

import pytest
import torch
from torch import nn

from models.attention.linear import LinearAttention
from models.attention.mean import MeanAttention, MeanCrossAttention
from models.attention.multihead import CrossAttention, MultiHeadAttention
from models.layers import FeedForward
from models.states import Chunk
from models.transformer import TransformerLayer

BOTH_ORDERS = pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
BIAS = {"qkv_bias": True, "output_bias": True}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def layer_of(attention, cross=None, *, norm_first=True, activation="gelu"):
    return TransformerLayer(
        attention,
        FeedForward(24, 40, activation, bias=True),
        [nn.LayerNorm(24) for _ in range(2 if cross is None else 3)],
        cross_attention=cross,
        norm_first=norm_first,
    )


@torch.no_grad()
def copy_attention(ours, theirs):
    theirs.in_proj_bias.normal_()
    theirs.out_proj.bias.normal_()
    for linear, weight, bias in zip(
        (ours.query, ours.key, ours.value), theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True
    ):
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    ours.output.load_state_dict(theirs.out_proj.state_dict())


def copy_rest(ours, theirs, norms):
    for norm, name in norms.items():
        nn.init.normal_(getattr(theirs, name).weight)
        nn.init.normal_(getattr(theirs, name).bias)
        getattr(ours, norm).load_state_dict(getattr(theirs, name).state_dict())
    ours.feed_forward.up.load_state_dict(theirs.linear1.state_dict())
    ours.feed_forward.down.load_state_dict(theirs.linear2.state_dict())


@BOTH_ORDERS
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_it_equals_the_encoder_layer_of_torch(norm_first, activation):
    theirs = nn.TransformerEncoderLayer(
        24, 4, 40, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    ours = layer_of(MultiHeadAttention(24, 4, **BIAS), norm_first=norm_first, activation=activation).double()
    copy_attention(ours.attention, theirs.self_attn)
    copy_rest(ours, theirs, {"attention_norm": "norm1", "feed_forward_norm": "norm2"})
    x, lengths = torch.randn(3, 7, 24, dtype=torch.float64), torch.tensor([7, 2, 5])
    valid = torch.arange(7) < lengths[:, None]
    expected = theirs(x, src_key_padding_mask=~valid)
    actual = ours(x, Chunk.of(x[..., 0], lengths)).x
    torch.testing.assert_close(actual[valid], expected[valid], rtol=0, atol=1e-10)


@BOTH_ORDERS
def test_it_equals_the_decoder_layer_of_torch(norm_first):
    theirs = nn.TransformerDecoderLayer(
        24, 4, 40, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    ours = layer_of(
        MultiHeadAttention(24, 4, causal=True, **BIAS), CrossAttention(24, 4, **BIAS), norm_first=norm_first
    ).double()
    copy_attention(ours.attention, theirs.self_attn)
    copy_attention(ours.cross_attention, theirs.multihead_attn)
    copy_rest(
        ours, theirs, {"attention_norm": "norm1", "cross_attention_norm": "norm2", "feed_forward_norm": "norm3"}
    )  # fmt: skip
    x, memory = torch.randn(3, 7, 24, dtype=torch.float64), torch.randn(3, 5, 24, dtype=torch.float64)
    valid = torch.arange(5) < torch.tensor([[5], [1], [3]])
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    expected = theirs(x, memory, tgt_mask=later, memory_key_padding_mask=~valid)
    actual = ours(x, Chunk.of(x[..., 0]), None, ours.project(memory), valid).x
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "attention",
    [
        MultiHeadAttention(24, 4, causal=True),
        LinearAttention(24, 4, features="elu", causal=True),
        MeanAttention(24, causal=True),
    ],
    ids=lambda attention: type(attention).__name__,
)
@pytest.mark.parametrize(
    "cross", [CrossAttention(24, 4, d_memory=10), MeanCrossAttention(24, 10)], ids=lambda cross: type(cross).__name__
)
@torch.no_grad()
def test_any_mechanism_fits_and_its_states_are_those_it_declares(attention, cross):
    layer = layer_of(attention, cross).eval()
    x, memory = torch.randn(2, 6, 24), torch.randn(2, 5, 10)
    valid = torch.arange(5) < torch.tensor([[5], [2]])
    expected = layer(x, Chunk.of(x[..., 0]), None, layer.project(memory), valid)
    assert expected.present == {}
    fixed = layer.project(memory.masked_fill(~valid[..., None], math.nan))
    past = {
        spec.name: torch.zeros(2, *spec.row_shape(6), dtype=spec.dtype)
        for spec in layer.state_specs()
        if spec.name not in fixed
    }
    outputs = []
    for position in range(6):
        chunk = Chunk.of(x[:, :1, 0], start=torch.tensor([position]))
        output = layer(x[:, position : position + 1], chunk, past, fixed, valid)
        past = output.present
        outputs.append(output.x)
    torch.testing.assert_close(torch.cat(outputs, 1), expected.x, rtol=0, atol=1e-5)
    assert {spec.name for spec in layer.state_specs()} == past.keys() | fixed.keys()


def test_weights_of_both_kinds_are_returned_when_asked_for():
    layer = layer_of(MultiHeadAttention(24, 4, causal=True), CrossAttention(24, 4)).eval()
    x, memory = torch.randn(2, 6, 24), torch.randn(2, 5, 24)
    arguments = (x, Chunk.of(x[..., 0]), None, layer.project(memory))
    plain, both = layer(*arguments), layer(*arguments, need_weights=True)
    crossed = layer(*arguments, need_cross_weights=True)
    assert (plain.weights, plain.cross_weights, crossed.weights) == (None, None, None)
    assert (both.weights.shape, both.cross_weights.shape) == ((2, 4, 6, 6), (2, 4, 6, 5))
    torch.testing.assert_close(crossed.cross_weights, both.cross_weights)
    torch.testing.assert_close(both.x, plain.x, rtol=0, atol=1e-5)


def test_dropout_acts_on_what_a_block_adds_in_training_only():
    layer = layer_of(MultiHeadAttention(24, 4))
    layer.dropout.p = 1.0
    x = torch.randn(2, 6, 24)
    assert torch.equal(layer(x, Chunk.of(x[..., 0])).x, x)
    assert not torch.equal(layer.eval()(x, Chunk.of(x[..., 0])).x, x)
