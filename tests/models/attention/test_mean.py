"""Mean pooling in place of attention: equal to attention with constant scores, step by step as well."""

import math

import pytest
import torch
from torch import nn

from models.attention.mean import MeanAttention, MeanCrossAttention
from models.attention.multihead import CrossAttention, MultiHeadAttention
from models.states import SOURCE, Chunk, StateRule


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def chunk_of(x, lengths=None, start=None):
    lengths = None if lengths is None else torch.tensor(lengths)
    return Chunk.of(x[..., 0], lengths, None if start is None else torch.tensor(start))


def uniform(attention, mean):
    """Make attention indifferent: all scores are 0, values pass unchanged, and the output is that of `mean`."""
    with torch.no_grad():
        attention.query.weight.zero_()
        attention.value.weight.copy_(torch.eye(12))
        attention.output.weight.copy_(mean.output.weight)
    return attention


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_attention_whose_scores_are_all_alike(causal):
    mean = MeanAttention(12, causal=causal).double()
    reference = uniform(MultiHeadAttention(12, 1, causal=causal).double(), mean)
    x, chunk = torch.randn(3, 7, 12, dtype=torch.float64), torch.tensor([7, 0, 4])
    expected = reference(x, Chunk.of(x[..., 0], chunk), need_weights=True)
    actual = mean(x, Chunk.of(x[..., 0], chunk), need_weights=True)
    valid = torch.arange(7) < chunk[:, None]
    torch.testing.assert_close(actual.output[valid], expected.output[valid], rtol=0, atol=1e-10)
    torch.testing.assert_close(actual.weights.double(), expected.weights, rtol=0, atol=1e-7)
    assert actual.output[1].isfinite().all()


def test_cross_attention_likewise_and_an_empty_memory_gives_zero():
    mean = MeanCrossAttention(12, 12).double()
    reference = uniform(CrossAttention(12, 1).double(), mean)
    x, memory = torch.randn(3, 5, 12, dtype=torch.float64), torch.randn(3, 7, 12, dtype=torch.float64)
    valid = torch.arange(7) < torch.tensor([[7], [0], [4]])
    expected = reference(x, reference.project(memory), valid, need_weights=True)
    memory[~valid] = math.nan
    actual = mean(x, mean.project(memory), valid, need_weights=True)
    torch.testing.assert_close(actual.output, expected.output, rtol=0, atol=1e-10)
    torch.testing.assert_close(actual.weights.double(), expected.weights, rtol=0, atol=1e-7)
    assert (actual.output[1] == 0).all()
    assert (actual.weights[1] == 0).all()
    whole = mean(x[:1], mean.project(memory[:1]), need_weights=True)
    torch.testing.assert_close(whole.output, actual.output[:1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_step_by_step_equals_one_pass_for_ragged_rows_and_padding_of_any_content(dtype):
    mean = MeanAttention(12, causal=True, bias=True).to(dtype)
    nn.init.normal_(mean.output.bias)
    (spec,) = mean.state_specs()
    assert (spec.rule, spec.dtype) == (StateRule.REPLACE, torch.promote_types(dtype, torch.float32))
    x = torch.randn(3, 20, 12).to(dtype)
    expected = mean(x, chunk_of(x)).output
    past = {"sum": torch.zeros(3, *spec.row_shape(20), dtype=spec.dtype)}
    starts = [0, 0, 0]
    for lengths in ([3, 0, 7], [1, 1, 1], [0, 0, 0], [9, 12, 2]):
        part = torch.full((3, 12, 12), math.nan, dtype=dtype)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            part[row, :length] = x[row, start : start + length]
        output = mean(part, chunk_of(part, lengths, starts), past)
        past = output.present
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
            torch.testing.assert_close(
                output.output[row, :length], expected[row, start : start + length], rtol=0, atol=tolerance
            )
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    empty = mean(x[:, :0], chunk_of(x[:, :0], start=starts), past)
    assert empty.output.shape == (3, 0, 12)
    assert torch.equal(empty.present["sum"], past["sum"])


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_pass_gradcheck(causal):
    mean = MeanAttention(3, causal=causal).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mean(x, chunk_of(x, [4, 2])).output, x)
    cross = MeanCrossAttention(3, 3).double()
    valid = torch.tensor([[True, True, False, False], [False] * 4])
    assert torch.autograd.gradcheck(lambda x: cross(x, cross.project(x), valid).output, x)


def test_what_it_declares_and_refuses():
    assert MeanAttention(12).state_specs() == ()
    (spec,) = MeanCrossAttention(12, 8).state_specs()
    assert (spec.rule, spec.shape) == (StateRule.FIXED, (SOURCE, 8))
    x, past = torch.randn(1, 3, 12), {"sum": torch.zeros(1, 12)}
    with pytest.raises(ValueError, match="a past needs causal attention"):
        MeanAttention(12)(x, chunk_of(x), past)
    with pytest.raises(ValueError, match="ask for them in a pass over the whole sequence"):
        MeanAttention(12, causal=True)(x, chunk_of(x), past, need_weights=True)
