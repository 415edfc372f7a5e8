"""Attention to a memory: what masks hide, what is made once, and that queries do not disturb each other."""

import math

import pytest
import torch

from models.attention.functional import entropy
from models.attention.memory import MemoryAttention
from models.attention.normalizers import NORMALIZERS, hardmax, masked_softmax
from models.attention.scores import SCORES, Additive, Dot, score_named
from models.states import SOURCE, StateRule

EVERY_SCORE = pytest.mark.parametrize("name", SCORES)
EVERY_NORMALIZER = pytest.mark.parametrize("normalizer", NORMALIZERS.values(), ids=NORMALIZERS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def attention_of(name, normalizer=masked_softmax):
    return MemoryAttention(score_named(name, 8, 8, 5), normalizer).double()


def inputs(rows=4, queries=3, places=7):
    query = torch.randn(rows, queries, 8, dtype=torch.float64)
    memory = torch.randn(rows, places, 8, dtype=torch.float64)
    valid = torch.arange(places) < torch.tensor([7, 1, 4, 0])[:rows, None]
    return query, memory, valid


def run(attention, query, memory, valid=None):
    return attention(query, attention.project(memory, valid), valid, need_weights=True)


@EVERY_NORMALIZER
@EVERY_SCORE
def test_context_is_the_weighted_sum_of_the_valid_places(name, normalizer):
    attention, (query, memory, valid) = attention_of(name, normalizer), inputs()
    context, weights = run(attention, query, memory, valid)
    for row, length in enumerate((7, 1, 4)):
        alone = run(attention, query[row : row + 1], memory[row : row + 1, :length])
        torch.testing.assert_close(weights[row : row + 1, :, :length], alone.weights, rtol=0, atol=1e-10)
        torch.testing.assert_close(context[row : row + 1], alone.weights @ memory[row : row + 1, :length])
        assert (weights[row, :, length:] == 0).all()
    torch.testing.assert_close(weights[:3].sum(-1), torch.ones(3, 3, dtype=torch.float64))


@EVERY_SCORE
def test_a_row_without_valid_places_reads_exactly_zero_with_finite_gradients(name):
    attention, (query, memory, valid) = attention_of(name), inputs()
    query, memory = query.requires_grad_(), memory.requires_grad_()
    context, weights = run(attention, query, memory, valid)
    assert (context[3] == 0).all()
    assert (weights[3] == 0).all()
    assert (entropy(weights)[3] == 0).all()
    context.square().sum().backward()
    for tensor in (query, memory, *attention.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()
    assert (memory.grad[~valid] == 0).all()


@EVERY_SCORE
def test_padding_may_hold_anything_in_values_and_in_gradients(name):
    attention, (query, memory, valid) = attention_of(name), inputs()
    results = []
    for garbage in (0.0, math.nan, math.inf, 1e30):
        dirty = memory.masked_fill(~valid[..., None], garbage).requires_grad_()
        context, weights = run(attention, query, dirty, valid)
        gradients = torch.autograd.grad(context.square().sum(), [dirty, *attention.parameters()], allow_unused=True)
        results.append([context, weights, *(gradient for gradient in gradients if gradient is not None)])
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


def test_a_zero_is_not_a_mask():
    attention, (query, memory, valid) = attention_of("additive"), inputs()
    zeroed = memory.masked_fill(~valid[..., None], 0.0)
    masked, open_ = run(attention, query, memory, valid), run(attention, query, zeroed)
    assert not torch.allclose(masked.weights[1:3], open_.weights[1:3], atol=1e-2)


@EVERY_SCORE
def test_queries_together_equal_queries_one_by_one(name):
    attention, (query, memory, valid) = attention_of(name), inputs()
    projected = attention.project(memory, valid)
    together = attention(query, projected, valid, need_weights=True)
    for step in range(3):
        alone = attention(query[:, step : step + 1], projected, valid, need_weights=True)
        torch.testing.assert_close(alone.context, together.context[:, step : step + 1], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.weights, together.weights[:, step : step + 1], rtol=0, atol=1e-12)
    assert attention(query, projected, valid).weights is None


@EVERY_SCORE
def test_the_order_of_the_memory_does_not_matter_if_the_mask_moves_along(name):
    attention, (query, memory, valid) = attention_of(name), inputs()
    order = torch.randperm(7)
    expected = run(attention, query, memory, valid)
    moved = run(attention, query, memory[:, order], valid[:, order])
    torch.testing.assert_close(moved.context, expected.context, rtol=0, atol=1e-12)
    torch.testing.assert_close(moved.weights, expected.weights[..., order], rtol=0, atol=1e-12)


@EVERY_SCORE
@pytest.mark.parametrize(("queries", "places"), [(3, 0), (0, 7), (0, 0)])
def test_empty_queries_and_empty_memory_keep_their_shapes(name, queries, places):
    query, memory, _ = inputs(queries=queries, places=places)
    context, weights = run(attention_of(name), query, memory)
    assert (context.shape, weights.shape) == ((4, queries, 8), (4, queries, places))
    assert (context == 0).all()


@EVERY_SCORE
def test_declared_states_are_what_project_makes(name):
    attention, (_, memory, valid) = attention_of(name), inputs()
    projected = attention.project(memory, valid)
    specs = attention.state_specs(torch.float64)
    assert [spec.name for spec in specs] == list(projected)
    assert list(projected) == (["memory", "keys"] if name in ("additive", "concat") else ["memory"])
    for spec in specs:
        assert (spec.rule, spec.shape[0]) == (StateRule.FIXED, SOURCE)
        assert projected[spec.name].shape == (4, *spec.row_shape(0, 7))
        assert projected[spec.name].dtype == spec.dtype


def test_keys_are_made_once_for_a_memory():
    attention, (query, memory, valid) = attention_of("additive"), inputs()
    calls = []
    attention.score.key.register_forward_hook(lambda *_: calls.append(1))
    projected = attention.project(memory, valid)
    for _ in range(5):
        attention(query, projected, valid)
    assert len(calls) == 1


@pytest.mark.parametrize("name", [name for name in SCORES if name != "mean"])
def test_gradients_pass_gradcheck_even_through_a_masked_row(name):
    attention, (query, memory, valid) = attention_of(name), inputs(queries=2)
    query, memory = query.requires_grad_(), memory.requires_grad_()
    assert torch.autograd.gradcheck(lambda *tensors: run(attention, *tensors, valid), (query, memory), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@EVERY_SCORE
def test_half_precision_stays_near_float32_and_keeps_its_type(name, dtype):
    attention, (query, memory, valid) = attention_of(name).float(), inputs()
    expected = run(attention, query.float(), memory.float(), valid)
    result = run(attention.to(dtype), query.to(dtype), memory.to(dtype), valid)
    assert result.context.dtype == result.weights.dtype == dtype
    torch.testing.assert_close(result.context.float(), expected.context, rtol=0, atol=8e-2)
    assert (result.context[3] == 0).all()


def test_the_mean_is_the_mean_of_valid_places():
    attention, (query, memory, valid) = attention_of("mean"), inputs()
    context, weights = run(attention, query, memory, valid)
    torch.testing.assert_close(context[2], memory[2, :4].mean(0).expand(3, 8))
    torch.testing.assert_close(
        entropy(weights)[:, 0], torch.tensor([math.log(7), 0.0, math.log(4), 0.0], dtype=torch.float64)
    )


def test_weights_never_hold_more_nats_than_there_are_places():
    query, memory, valid = inputs()
    nats = entropy(run(attention_of("additive"), query, memory, valid).weights)
    assert (nats <= valid.sum(1).clamp(min=1).log()[:, None] + 1e-12).all()
    assert (entropy(run(attention_of("dot", hardmax), query, memory, valid).weights) == 0).all()


def test_a_memory_of_another_width_is_refused():
    with pytest.raises(ValueError, match="memory has width 9; this attention was made for 8"):
        MemoryAttention(Dot(8, 8)).project(torch.zeros(2, 3, 9))
    assert MemoryAttention(Additive(4, 9, 5)).project(torch.zeros(2, 3, 9))["keys"].shape == (2, 3, 5)
