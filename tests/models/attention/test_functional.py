"""Properties of attention as a function, on the fused path and on the one that returns weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.attention.functional import allow, attend, entropy
from models.attention.normalizers import entmax15, masked_softmax, sparsemax

BOTH_PATHS = pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(*, rows=2, heads=4, kv_heads=2, queries=5, keys=7, head_dim=8, value_dim=6, dtype=torch.float64):
    return (
        torch.randn(rows, heads, queries, head_dim, dtype=dtype),
        torch.randn(rows, kv_heads, keys, head_dim, dtype=dtype),
        torch.randn(rows, kv_heads, keys, value_dim, dtype=dtype),
    )


def by_hand(query, key, value, mask=None, bias=None, scale=None):
    """Attention with loops over rows, heads and queries, in float64."""
    rows, heads, queries, head_dim = query.shape
    groups = heads // key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    full = (rows, heads, queries, key.shape[2])
    mask = torch.ones(full, dtype=torch.bool) if mask is None else mask.expand(full)
    bias = torch.zeros(full) if bias is None else bias.expand(full)
    output = torch.zeros(rows, heads, queries, value.shape[3], dtype=torch.float64)
    for b in range(rows):
        for h in range(heads):
            for t in range(queries):
                allowed = mask[b, h, t].nonzero().flatten().tolist()
                scores = [
                    math.exp(float(query[b, h, t].double() @ key[b, h // groups, s].double()) * scale)
                    * math.exp(float(bias[b, h, t, s]))
                    for s in allowed
                ]
                for s, score in zip(allowed, scores, strict=True):
                    output[b, h, t] += score / sum(scores) * value[b, h // groups, s].double()
    return output


@BOTH_PATHS
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_it_equals_the_definition_for_any_grouping(heads, kv_heads, need_weights):
    query, key, value = inputs(heads=heads, kv_heads=kv_heads)
    mask = torch.rand(2, heads, 5, 7) > 0.3
    output, weights = attend(query, key, value, mask, need_weights=need_weights)
    torch.testing.assert_close(output, by_hand(query, key, value, mask), rtol=0, atol=1e-10)
    assert (weights is not None) is need_weights


@BOTH_PATHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_equals_torch_for_every_dtype(dtype, need_weights):
    query, key, value = inputs(dtype=dtype, value_dim=8)
    mask = torch.rand(2, 1, 5, 7) > 0.3
    expected = F.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=mask
    )
    output, _ = attend(query, key, value, mask, need_weights=need_weights)
    atol = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=0, atol=atol)


@BOTH_PATHS
def test_a_fully_masked_query_gets_exactly_zero_and_disturbs_no_other(need_weights):
    query, key, value = (tensor.requires_grad_() for tensor in inputs())
    mask = torch.rand(2, 4, 5, 7) > 0.3
    open_output, _ = attend(query, key, value, mask, need_weights=need_weights)
    mask[0, :, 2] = mask[1, 3, 0] = False
    output, weights = attend(query, key, value, mask, need_weights=need_weights)
    dead = ~mask.any(-1)
    assert dead.sum() >= 5
    assert (output[dead] == 0).all()
    torch.testing.assert_close(output[~dead], open_output[~dead], rtol=0, atol=1e-12)
    if need_weights:
        assert (weights[dead] == 0).all()
        assert (entropy(weights)[dead] == 0).all()
    output.square().sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad.isfinite().all()
    assert (query.grad[dead] == 0).all()


@BOTH_PATHS
def test_a_row_without_any_key_left_gives_zero(need_weights):
    query, key, value = inputs()
    valid = torch.tensor([[True] * 7, [False] * 7])
    mask = allow(torch.arange(5)[None], torch.arange(7)[None], key_valid=valid)
    output, _ = attend(query, key, value, mask, need_weights=need_weights)
    assert (output[1] == 0).all()
    torch.testing.assert_close(output[:1], by_hand(query[:1], key[:1], value[:1]), rtol=0, atol=1e-10)


@BOTH_PATHS
@pytest.mark.parametrize(("queries", "keys"), [(5, 0), (0, 7), (0, 0)])
def test_empty_queries_and_empty_memory_keep_their_shapes(queries, keys, need_weights):
    query, key, value = inputs(queries=queries, keys=keys)
    output, weights = attend(query, key, value, torch.ones(queries, keys, dtype=torch.bool), need_weights=need_weights)
    assert output.shape == (2, 4, queries, 6)
    assert (output == 0).all()
    if need_weights:
        assert weights.shape == (2, 4, queries, keys)


@BOTH_PATHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_does_not_overflow(dtype, need_weights):
    query = torch.full((1, 1, 3, 64), 40.0, dtype=dtype)  # a product of 102,400 is more than float16 can hold
    value = torch.randn(1, 1, 3, 8, dtype=dtype)
    mask = torch.tensor([[True, False, False], [True, True, False], [False, False, False]])
    output, _ = attend(query, query.clone(), value, mask, need_weights=need_weights)
    assert output.isfinite().all()
    expected, _ = attend(query.float(), query.float(), value.float(), mask)
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=2e-2)


@BOTH_PATHS
def test_layout_in_memory_changes_nothing_and_inputs_stay_as_they_were(need_weights):
    query, key, value = inputs()
    mask = (torch.rand(2, 4, 7, 5) > 0.3).transpose(2, 3)
    expected, _ = attend(query, key, value, mask.contiguous(), need_weights=need_weights)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value)]
    copies = [tensor.clone() for tensor in (*strided, mask)]
    output, _ = attend(*strided, mask, need_weights=need_weights)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    for tensor, copy in zip((*strided, mask), copies, strict=True):
        assert torch.equal(tensor, copy)
    one_key = key[:, :, :1].expand_as(key)  # stride 0
    output, _ = attend(query, one_key, value, mask, need_weights=need_weights)
    expected, _ = attend(query, one_key.contiguous(), value, mask, need_weights=need_weights)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@BOTH_PATHS
def test_masks_of_every_rank_agree_and_true_means_attend(need_weights):
    query, key, value = inputs()
    keys = torch.tensor([True, True, False, True, False, True, True])
    expected = by_hand(query, key[:, :, keys], value[:, :, keys])
    for mask in (keys, keys.expand(5, 7), keys.expand(2, 1, 1, 7), keys.expand(2, 4, 5, 7), keys.expand(1, 4, 1, 7)):
        output, _ = attend(query, key, value, mask, need_weights=need_weights)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)


@BOTH_PATHS
def test_an_additive_mask_as_bias_equals_the_boolean_mask(need_weights):
    query, key, value = inputs()
    mask = torch.rand(2, 1, 5, 7) > 0.3
    bias = torch.zeros(2, 1, 5, 7, dtype=torch.float64).masked_fill(~mask, -math.inf)
    expected, _ = attend(query, key, value, mask, need_weights=need_weights)
    torch.testing.assert_close(attend(query, key, value, bias=bias)[0], expected, rtol=0, atol=1e-12)
    bias = torch.randn(4, 5, 7, dtype=torch.float64)
    output, _ = attend(query, key, value, mask, bias=bias, need_weights=need_weights)
    torch.testing.assert_close(output, by_hand(query, key, value, mask, bias), rtol=0, atol=1e-10)


@BOTH_PATHS
def test_hidden_keys_and_values_may_hold_anything(need_weights):
    query, key, value = inputs()
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask[..., 4] = False
    mask[1, ..., 5:] = False
    expected, _ = attend(query, key, value, mask, need_weights=need_weights)
    key[:, :, 4], value[:, :, 4], key[1, :, 5:], value[1, :, 5:] = math.nan, math.inf, math.inf, math.nan
    output, _ = attend(query, key, value, mask, need_weights=need_weights)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@BOTH_PATHS
def test_query_head_h_reads_key_value_head_h_divided_by_the_group_size(need_weights):
    query, key, _ = inputs(heads=6, kv_heads=2)
    value = torch.arange(2.0, dtype=torch.float64).reshape(1, 2, 1, 1).expand(2, 2, 7, 3)
    output, _ = attend(query, key, value, need_weights=need_weights)
    assert output[0, :, 0, 0].tolist() == pytest.approx([0, 0, 0, 1, 1, 1])
    spread, _ = attend(query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), need_weights=need_weights)
    torch.testing.assert_close(output, spread, rtol=0, atol=1e-12)


@BOTH_PATHS
def test_the_scale_is_one_over_the_root_of_the_head_width(need_weights):
    query, key, value = inputs(value_dim=3)
    default, _ = attend(query, key, value, need_weights=need_weights)
    for scale, expected in ((8**-0.5, default), (0.7, by_hand(query, key, value, scale=0.7))):
        output, _ = attend(query, key, value, scale=scale, need_weights=need_weights)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)


def test_scaled_scores_of_normal_vectors_have_unit_variance():
    query, key = torch.randn(1, 1, 500, 64), torch.randn(1, 1, 500, 64)
    _, weights = attend(query, key, key, need_weights=True)
    scores = weights.log()  # scores up to a constant of each row
    assert (scores - scores.mean(-1, keepdim=True)).var().item() == pytest.approx(1.0, abs=0.03)


def test_dropout_keeps_the_expectation_and_returns_weights_from_before():
    query, key, value = inputs(rows=1, dtype=torch.float32)
    exact, weights = attend(query, key, value, need_weights=True)
    many = [tensor.expand(4000, *tensor.shape[1:]) for tensor in (query, key, value)]
    for need_weights in (False, True):
        dropped, returned = attend(*many, dropout=0.3, need_weights=need_weights)
        torch.testing.assert_close(dropped.mean(0), exact[0], rtol=0, atol=0.06)
        assert not torch.equal(dropped[0], dropped[1])
        if need_weights:
            torch.testing.assert_close(returned[0], weights[0])
            torch.testing.assert_close(returned.sum(-1), torch.ones(4000, 4, 5))
    output, _ = attend(query, key, value, dropout=1.0, need_weights=True)
    assert (output == 0).all()


def test_dropout_differs_between_heads():
    query = torch.zeros(1, 8, 1, 4)  # all heads attend alike
    _, weights = attend(query, query.expand(1, 8, 1, 4), query, need_weights=True)
    value = torch.eye(16)[None, None].expand(1, 8, 16, 16)
    output, _ = attend(query, torch.zeros(1, 8, 16, 4), value, dropout=0.5, need_weights=True)
    assert len({tuple(head.flatten().tolist()) for head in output[0]}) > 4
    assert (weights == 1).all()


def test_cross_attention_ignores_the_order_of_memory():
    query, key, value = inputs()
    mask = torch.rand(2, 1, 1, 7) > 0.3
    order = torch.randperm(7)
    output, _ = attend(query, key, value, mask)
    permuted, _ = attend(query, key[:, :, order], value[:, :, order], mask[..., order])
    torch.testing.assert_close(output, permuted, rtol=0, atol=1e-12)


@BOTH_PATHS
def test_gradients_pass_gradcheck_even_through_a_masked_row(need_weights):
    query, key, value = (tensor.requires_grad_() for tensor in inputs(rows=1, queries=3, keys=4, head_dim=4))
    mask = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    assert torch.autograd.gradcheck(
        lambda *tensors: attend(*tensors, mask, need_weights=need_weights)[0], (query, key, value)
    )


@BOTH_PATHS
def test_a_softcap_squashes_scaled_scores_before_bias_and_mask(need_weights):
    query, key, value = inputs(heads=2, value_dim=3)
    query = query * 10
    mask, bias = torch.rand(2, 1, 5, 7) > 0.3, torch.randn(2, 5, 7, dtype=torch.float64)
    scores = 4.0 * torch.tanh(query @ key.mT / math.sqrt(8) / 4.0) + bias
    expected = scores.masked_fill(~mask, -math.inf).softmax(-1) @ value
    output, weights = attend(query, key, value, mask, bias=bias, softcap=4.0, need_weights=need_weights)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    if need_weights:
        assert (weights.masked_select(~mask) == 0).all()  # a mask that is squashed too would leak
    loose, _ = attend(query, key, value, mask, softcap=1e6, need_weights=need_weights)
    torch.testing.assert_close(loose, attend(query, key, value, mask)[0], rtol=0, atol=1e-8)


@BOTH_PATHS
@pytest.mark.parametrize("normalizer", [sparsemax, entmax15])
def test_any_normalizer_turns_scores_into_the_weights_that_are_used(normalizer, need_weights):
    query, key, value = inputs(heads=2)
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask[0, :, 1] = False
    expected = normalizer(query @ key.mT / math.sqrt(8), mask.expand(2, 2, 5, 7))
    output, weights = attend(query, key, value, mask, normalizer=normalizer, need_weights=need_weights)
    torch.testing.assert_close(output, expected @ value, rtol=0, atol=1e-10)
    assert (output[0, :, 1] == 0).all()
    if need_weights:
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-10)
        assert ((weights == 0) & mask).any()


@pytest.mark.parametrize(
    "options", [{}, {"need_weights": True}, {"softcap": 30.0}, {"bias": torch.zeros(1, 1, 3, 3)}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_finite_forward_and_backward_whatever_the_path(dtype, options):
    query = torch.full((1, 1, 3, 64), 40.0, dtype=dtype, requires_grad=True)
    value = torch.randn(1, 1, 3, 8, dtype=dtype)
    for mask in (None, torch.tensor([[True, False, False], [True, True, False], [False, False, False]])):
        output, _ = attend(query, query, value, mask, **options)
        assert output.dtype == dtype
        assert output.isfinite().all()
        output.float().sum().backward()
        assert query.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"bias": True}, {"softcap": 2.0, "bias": True}], ids=str)
def test_gradients_pass_gradcheck_with_softcap_and_bias(options):
    query, key, value = (tensor.requires_grad_() for tensor in inputs(rows=1, queries=3, keys=4, head_dim=4))
    mask = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    tensors, softcap = (query, key, value), options.get("softcap")
    if "bias" in options:
        tensors += (torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True),)
    assert torch.autograd.gradcheck(
        lambda query, key, value, bias=None: attend(query, key, value, mask, bias=bias, softcap=softcap)[0], tensors
    )


def test_misuse_is_refused_with_advice():
    query, key, value = inputs()
    with pytest.raises(TypeError, match="booleans, True = attend, and pass additive masks as bias"):
        attend(query, key, value, torch.zeros(5, 7))
    with pytest.raises(ValueError, match="num_heads 4 is not a multiple of num_kv_heads 3"):
        attend(query, *inputs(kv_heads=3)[1:])
    with pytest.raises(ValueError, match="query head width 8 differs from key head width 9"):
        attend(query, inputs(head_dim=9)[1], value)
    for softcap in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"it must be above 0"):
            attend(query, key, value, softcap=softcap)
    with pytest.raises(ValueError, match="differ in rows, heads or length"):
        attend(query, key, value[:, :, 1:])


class TestAllow:
    def test_causal_positions_are_absolute(self):
        mask = allow(torch.tensor([[5, 6, 7]]), torch.arange(8)[None], causal=True)
        full = torch.ones(8, 8, dtype=torch.bool).tril()
        assert torch.equal(mask[0, 0], full[5:])
        assert not torch.equal(mask[0, 0], torch.ones(3, 8, dtype=torch.bool).tril())  # not aligned at the top left
        assert allow(torch.tensor([[7]]), torch.arange(8)[None], causal=True).all()

    def test_windows_count_positions_on_each_side(self):
        positions = torch.arange(6)[None]
        mask = allow(positions, positions, left=2, right=1)[0, 0]
        for query in range(6):
            assert mask[query].nonzero().flatten().tolist() == [k for k in range(6) if query - 2 <= k <= query + 1]
        assert torch.equal(
            allow(positions, positions, causal=True, left=2), allow(positions, positions, left=2, right=0)
        )

    def test_rows_have_their_own_positions_and_validity(self):
        starts = torch.tensor([[0], [4]])
        valid = torch.tensor([[True, True, False, False, False, False], [True, False, True, True, True, True]])
        mask = allow(starts + torch.arange(2), torch.arange(6)[None], causal=True, key_valid=valid)
        assert mask.shape == (2, 1, 2, 6)
        assert mask[0, 0].int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
        assert mask[1, 0].int().tolist() == [[1, 0, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1]]


class TestMaskedSoftmax:
    def test_it_is_the_softmax_of_what_is_allowed(self):
        scores, mask = torch.randn(3, 4, 9), torch.rand(3, 4, 9) > 0.4
        weights = masked_softmax(scores, mask)
        for row, allowed, result in zip(scores.flatten(0, 1), mask.flatten(0, 1), weights.flatten(0, 1), strict=True):
            torch.testing.assert_close(result[allowed], row[allowed].softmax(-1))
            assert (result[~allowed] == 0).all()
        torch.testing.assert_close(masked_softmax(scores), scores.softmax(-1))
        torch.testing.assert_close(masked_softmax(scores, mask, dim=1), masked_softmax(scores.mT, mask.mT).mT)

    def test_rows_of_nothing_are_zero_whether_masked_or_minus_infinity(self):
        scores = torch.randn(2, 5)
        scores[0] = -math.inf
        mask = torch.tensor([[True] * 5, [False] * 5])
        assert (masked_softmax(scores, mask) == 0).all()
        assert masked_softmax(torch.randn(2, 3, 0)).shape == (2, 3, 0)

    def test_large_scores_and_half_precision_stay_finite(self):
        assert masked_softmax(torch.tensor([1e30, -1e30, 0.0])).tolist() == [1, 0, 0]
        weights = masked_softmax(torch.tensor([60000.0, 60000.0, -60000.0], dtype=torch.float16))
        assert (weights.dtype, weights.tolist()) == (torch.float16, [0.5, 0.5, 0])

    def test_first_and_second_derivatives_are_right(self):
        scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        mask = torch.rand(3, 5) > 0.3
        mask[1] = False
        assert torch.autograd.gradcheck(lambda x: masked_softmax(x, mask), scores)
        assert torch.autograd.gradgradcheck(lambda x: masked_softmax(x, mask), scores)


def test_entropy_is_in_nats_and_zero_for_certainty():
    weights = torch.tensor([[1 / 8] * 8, [1] + [0] * 7, [0.5, 0.5] + [0] * 6, [0] * 8])
    assert entropy(weights).tolist() == pytest.approx([2.0794415, 0, math.log(2), 0])
