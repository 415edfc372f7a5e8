"""Normalisers: the simplex, exact zeros, masks, gradients, and parity with the package entmax."""

import math

import entmax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention.functional import attend, entropy
from models.attention.multihead import MultiHeadAttention
from models.attention.normalizers import (
    NORMALIZERS,
    Tempered,
    entmax15,
    hardmax,
    masked_softmax,
    normalizer_named,
    sparsemax,
)
from models.states import Chunk

ALL = pytest.mark.parametrize("normalize", NORMALIZERS.values(), ids=NORMALIZERS)
SMOOTH = pytest.mark.parametrize("normalize", [masked_softmax, sparsemax, entmax15], ids=lambda one: one.__name__)
SPARSE = pytest.mark.parametrize(
    ("normalize", "reference", "alpha"),
    [(sparsemax, entmax.sparsemax, 2.0), (entmax15, entmax.entmax15, 1.5)],
    ids=["sparsemax", "entmax15"],
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def by_bisection(scores, alpha):
    """Solve sum(max(0, (alpha - 1) x - t) ** (1 / (alpha - 1))) = 1 for the threshold t."""
    x = scores * (alpha - 1)
    low, high = x.amax(-1, keepdim=True) - 1, x.amax(-1, keepdim=True)
    for _ in range(80):
        middle = (low + high) / 2
        over = ((x - middle).clamp(min=0) ** (1 / (alpha - 1))).sum(-1, keepdim=True) >= 1
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return (x - low).clamp(min=0) ** (1 / (alpha - 1))


@SPARSE
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_sparse_weights_and_gradients_equal_the_package_entmax(normalize, reference, alpha, spread):
    scores = (torch.randn(6, 5, 33, dtype=torch.float64) * spread).requires_grad_()
    weights, expected = normalize(scores), reference(scores, dim=-1)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-10)
    upstream = torch.randn_like(weights)
    gradient, expected_gradient = (torch.autograd.grad(one, scores, upstream)[0] for one in (weights, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)


@SPARSE
def test_sparse_weights_solve_their_definition(normalize, reference, alpha):
    scores = torch.randn(50, 12, dtype=torch.float64) * 2
    torch.testing.assert_close(normalize(scores), by_bisection(scores, alpha), rtol=0, atol=1e-10)


@SPARSE
def test_sparse_jacobians_have_their_closed_form(normalize, reference, alpha):
    scores = torch.randn(9, dtype=torch.float64) * 0.6
    weights = normalize(scores)
    assert 1 < (weights > 0).sum() < 9
    slope = torch.where(weights > 0, weights ** (2 - alpha), 0.0)
    expected = slope.diag() - torch.outer(slope, slope) / slope.sum()
    torch.testing.assert_close(torch.autograd.functional.jacobian(normalize, scores), expected, rtol=0, atol=1e-10)


@ALL
@given(
    scores=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20),
    hidden=st.lists(st.booleans(), min_size=20, max_size=20),
    shift=st.floats(-100, 100, width=32),
)
@settings(deadline=None, max_examples=60)
def test_weights_lie_in_the_simplex_of_what_is_allowed_and_keep_the_order(normalize, scores, hidden, shift):
    scores = torch.tensor(scores, dtype=torch.float64)
    mask = ~torch.tensor(hidden[: len(scores)])
    weights = normalize(scores, mask)
    assert (weights >= 0).all()
    assert (weights[~mask] == 0).all()
    assert float(weights.sum()) == pytest.approx(1.0 if mask.any() else 0.0)
    if normalize is not hardmax:  # for which rounding may make equals of the best two
        torch.testing.assert_close(normalize(scores + shift, mask), weights, rtol=0, atol=1e-7)
    if mask.any():  # masking is leaving out
        torch.testing.assert_close(weights[mask], normalize(scores[mask]), rtol=0, atol=1e-12)
        ordered = weights[mask][scores[mask].argsort(stable=True)]
        if normalize is not hardmax:
            assert (ordered.diff() >= -1e-12).all()
        assert float(weights[mask].max()) == float(weights[mask][scores[mask].argmax()])


def test_the_sparser_the_normaliser_the_more_exact_zeros():
    scores = torch.randn(200, 30)
    supports = [int((normalize(scores) > 0).sum()) for normalize in (masked_softmax, entmax15, sparsemax, hardmax)]
    assert supports[0] == 200 * 30
    assert supports == sorted(supports, reverse=True)
    assert supports[-1] == 200


@ALL
def test_equal_scores_share_the_weight_or_the_first_takes_it(normalize):
    weights = normalize(torch.full((4,), 3.0))
    expected = [1.0, 0.0, 0.0, 0.0] if normalize is hardmax else [0.25] * 4
    assert weights.tolist() == pytest.approx(expected)


@ALL
def test_a_slice_of_nothing_is_zero_with_zero_gradient_and_disturbs_no_other(normalize):
    scores = torch.randn(4, 6, dtype=torch.float64)
    scores[1] = -math.inf
    mask = torch.rand(4, 6) > 0.3
    mask[3] = False
    scores.requires_grad_()
    weights = normalize(scores, mask)
    assert (weights[[1, 3]] == 0).all()
    assert (entropy(weights)[[1, 3]] == 0).all()
    for row in (0, 2):
        torch.testing.assert_close(weights[row], normalize(scores[row], mask[row]), rtol=0, atol=1e-12)
    if normalize is not hardmax:
        (weights * torch.randn(6, dtype=torch.float64)).sum().backward()
        assert scores.grad.isfinite().all()
        assert (scores.grad[[1, 3]] == 0).all()


@ALL
def test_what_is_masked_may_hold_anything(normalize):
    scores, mask = torch.randn(5, 8, dtype=torch.float64), torch.rand(5, 8) > 0.4
    expected = normalize(scores, mask)
    for garbage in (math.nan, math.inf, -math.inf, 1e300):
        dirty = scores.masked_fill(~mask, garbage).requires_grad_()
        before = dirty.detach().clone()
        weights = normalize(dirty, mask)
        assert torch.equal(weights, expected)
        if normalize is not hardmax:
            weights.square().sum().backward()
            assert dirty.grad.isfinite().all()
            assert (dirty.grad[~mask] == 0).all()
        torch.testing.assert_close(dirty.detach(), before, equal_nan=True)


@ALL
def test_minus_infinity_hides_as_a_mask_does(normalize):
    scores, mask = torch.randn(5, 8), torch.rand(5, 8) > 0.4
    assert torch.equal(normalize(scores.masked_fill(~mask, -math.inf)), normalize(scores, mask))


@SMOOTH
def test_first_and_second_derivatives_pass_gradcheck_even_with_a_masked_row(normalize):
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True, True], [False] * 5, [True] * 5])
    assert torch.autograd.gradcheck(lambda scores: normalize(scores, mask), scores)
    assert torch.autograd.gradgradcheck(lambda scores: normalize(scores, mask), scores)


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(normalize, dtype):
    scores = torch.randn(4, 300).to(dtype)
    scores[0] *= 1000
    weights = normalize(scores)
    assert weights.dtype == dtype
    torch.testing.assert_close(weights, normalize(scores.float()).to(dtype), rtol=0, atol=0)
    assert (weights.float().sum(-1) - 1).abs().max() < 2e-2


@ALL
def test_large_scores_do_not_overflow_and_long_slices_keep_their_sum(normalize):
    assert normalize(torch.tensor([3e38, -3e38, 0.0])).tolist() == [1.0, 0.0, 0.0]
    weights = normalize(torch.randn(3, 4096) * 0.01)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3), rtol=0, atol=1e-4)


@ALL
def test_layout_and_empty_slices_make_no_difference(normalize):
    scores, mask = torch.randn(3, 7, 4), torch.rand(1, 7, 1) > 0.3
    assert torch.equal(normalize(scores.mT, mask.mT), normalize(scores.mT.contiguous(), mask.mT.expand(3, 4, 7)))
    assert normalize(torch.zeros(2, 3, 0)).shape == (2, 3, 0)
    assert normalize(torch.zeros(0, 3)).shape == (0, 3)


class TestTemperature:
    def test_scores_are_divided_by_it(self):
        scores, mask = torch.randn(4, 6), torch.rand(4, 6) > 0.3
        torch.testing.assert_close(Tempered(masked_softmax, 2.5)(scores), (scores / 2.5).softmax(-1))
        for normalize in NORMALIZERS.values():
            assert torch.equal(Tempered(normalize, 0.5)(scores, mask), normalize(scores * 2, mask))

    def test_its_limits_are_the_best_place_and_the_mean(self):
        scores = torch.randn(4, 6)
        torch.testing.assert_close(Tempered(masked_softmax, 1e-4)(scores), hardmax(scores))
        torch.testing.assert_close(Tempered(masked_softmax, 1e6)(scores), torch.full((4, 6), 1 / 6), rtol=0, atol=1e-5)

    def test_half_precision_stays_what_it_was(self):
        weights = Tempered(sparsemax, 0.01)(torch.tensor([60000.0, 0.0], dtype=torch.float16))
        assert weights.dtype == torch.float16
        assert weights.tolist() == [1.0, 0.0]

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
    def test_it_must_be_positive(self, temperature):
        with pytest.raises(ValueError, match=rf"temperature is {temperature}; it must be above 0"):
            normalizer_named("softmax", temperature=temperature)


def test_names_of_configurations_lead_to_normalisers():
    assert normalizer_named("softmax") is masked_softmax  # itself, so that attention takes its fused path
    assert normalizer_named("entmax15", temperature=2.0) == Tempered(entmax15, 2.0)
    with pytest.raises(
        ValueError, match="normalizer is 'softmx'; it must be one of softmax, sparsemax, entmax15, hard"
    ):
        normalizer_named("softmx")


@ALL
def test_attention_takes_any_normaliser(normalize):
    query, key, value = (torch.randn(2, heads, 5, 8, dtype=torch.float64) for heads in (4, 2, 2))
    mask = torch.rand(2, 4, 5, 5) > 0.3
    mask[0, 1, 2] = False
    output, weights = attend(query, key, value, mask, normalizer=normalize, need_weights=True)
    scores = query @ key.repeat_interleave(2, 1).mT * 8**-0.5
    torch.testing.assert_close(weights, normalize(scores, mask), rtol=0, atol=1e-12)
    torch.testing.assert_close(output, weights @ value.repeat_interleave(2, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(attend(query, key, value, mask, normalizer=normalize)[0], output, rtol=0, atol=1e-12)
    assert (output[0, 1, 2] == 0).all()


@pytest.mark.parametrize("normalize", [sparsemax, entmax15, Tempered(masked_softmax, 0.7)], ids=str)
def test_multi_head_attention_takes_it_step_by_step_as_well(normalize):
    attention = MultiHeadAttention(16, 4, causal=True, normalizer=normalize).double().eval()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    full = attention(x, Chunk.of(x[..., 0]), need_weights=True)
    past = {name: torch.zeros(2, 4, 6, 4, dtype=torch.float64) for name in ("key", "value")}
    for step in range(6):
        chunk = Chunk.of(x[:, step : step + 1, 0], start=torch.tensor([step]))
        attended = attention(x[:, step : step + 1], chunk, past)
        past = attended.present
        torch.testing.assert_close(attended.output, full.output[:, step : step + 1], rtol=0, atol=1e-10)
    if not isinstance(normalize, Tempered):
        assert (full.weights[:, :, -1] == 0).any()
