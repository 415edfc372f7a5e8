"""Multi-head attention: parity with torch, and what a past must and must not change."""

import math

import pytest
import torch
from torch import nn

from models.attention.multihead import CrossAttention, MultiHeadAttention
from models.attention.normalizers import entmax15, sparsemax
from models.attention.positions import Rotary
from models.states import SOURCE, Chunk, StateRule


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
    without_weights = ours(x, chunk_of(x, lengths)).output  # on this path what padding reads means nothing
    torch.testing.assert_close(without_weights[~ignored], expected[~ignored], rtol=0, atol=1e-10)


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


def cached_pass(attention, x, chunks, capacity, dtype=torch.float64):
    """Attend chunk by chunk, every row with lengths of its own; return each row's outputs."""
    rows = len(x)
    past = {spec.name: torch.zeros(rows, *spec.row_shape(capacity), dtype=dtype) for spec in attention.state_specs()}
    starts, outputs = torch.zeros(rows, dtype=torch.int64), [[] for _ in range(rows)]
    for lengths in chunks:
        width = max(lengths)
        part = torch.full((rows, width, x.shape[-1]), 1e3, dtype=dtype)
        for row, length in enumerate(lengths):
            part[row, :length] = x[row, starts[row] : starts[row] + length]
        attended = attention(part, Chunk(start=starts, lengths=torch.tensor(lengths), num_tokens=width), past)
        past, starts = attended.present, starts + torch.tensor(lengths)
        for row, length in enumerate(lengths):
            outputs[row].append(attended.output[row, :length])
    return [torch.cat(parts) for parts in outputs]


RAGGED = [[7, 1, 0], [1, 1, 1], [0, 9, 3], [2, 0, 11], [5, 4, 0]]
MECHANISMS = {
    "plain": {},
    "multi-query": {"num_kv_heads": 1},
    "rotary": {"rotary": Rotary(4)},
    "alibi": {"alibi": True},
    "qk-norm": {"qk_norm": True, "rotary": Rotary(4, interleaved=True)},
    "softcap": {"softcap": 2.0},
    "sparsemax": {"normalizer": sparsemax},
    "entmax": {"normalizer": entmax15, "alibi": True},
    "window": {"window": 4, "alibi": True},
    "window of one": {"window": 1},
    "ring": {"window": 4, "window_state": "ring", "alibi": True},
    "ring of one": {"window": 1, "window_state": "ring"},
    "ring, rotary": {"window": 5, "window_state": "ring", "rotary": Rotary(4), "num_kv_heads": 2},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mechanism", MECHANISMS)
@torch.no_grad()
def test_ragged_rows_step_by_step_equal_one_pass(mechanism, dtype):
    attention = MultiHeadAttention(24, 6, causal=True, **MECHANISMS[mechanism]).to(dtype)
    x = torch.randn(3, 15, 24).to(dtype)
    expected = attention(x, chunk_of(x), need_weights=True)  # the path without shortcuts
    atol = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    for row, actual in enumerate(cached_pass(attention, x, RAGGED, 16, dtype)):
        torch.testing.assert_close(actual, expected.output[row, : len(actual)], rtol=0, atol=atol)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_mechanism_passes_gradcheck(mechanism):
    attention = MultiHeadAttention(24, 6, causal=True, **MECHANISMS[mechanism]).double()
    x = torch.randn(1, 4, 24, dtype=torch.float64, requires_grad=True)
    if "rotary" in MECHANISMS[mechanism]:
        attention.rotary = None  # its cosines are float32; positions have tests of their own
    directions = torch.randn(6, 24, dtype=torch.float64)

    def along(weights):  # a few directions instead of all 96 numbers
        return attention(x.detach() + (weights @ directions)[:, None], chunk_of(x, [3])).output[:, :3]

    assert torch.autograd.gradcheck(along, torch.zeros(1, 6, dtype=torch.float64, requires_grad=True))


def test_alibi_equals_a_bias_by_distance_whatever_came_before():
    attention = MultiHeadAttention(24, 6, causal=True, alibi=True).double()
    x = torch.randn(2, 8, 24, dtype=torch.float64)
    query, key, value = attention.queries(x), attention.keys(x), attention.values(x)
    distance = torch.arange(8)[:, None] - torch.arange(8)
    slopes = torch.tensor([0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125], dtype=torch.float64)
    scores = query @ key.mT / 2 - slopes[:, None, None] * distance
    weights = scores.masked_fill(distance < 0, -math.inf).softmax(-1)
    expected = attention.merge(weights @ value)
    actual = attention(x, chunk_of(x), need_weights=True)
    torch.testing.assert_close(actual.output, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(actual.weights, weights, rtol=0, atol=1e-10)


def test_alibi_without_causality_costs_the_same_in_both_directions():
    attention = MultiHeadAttention(24, 6, alibi=True).double()
    x = torch.randn(2, 8, 24, dtype=torch.float64)
    mirrored = attention(x.flip(1), chunk_of(x)).output.flip(1)
    torch.testing.assert_close(attention(x, chunk_of(x)).output, mirrored, rtol=0, atol=1e-10)


def test_options_that_exclude_each_other_are_refused():
    for options, message in (
        ({"window": 0}, "window is 0; it must be at least 1"),
        ({"window_state": "heap"}, "window_state is 'heap'; it must be append or ring"),
        ({"window_state": "ring", "causal": True}, "needs causal attention with a window"),
        ({"window_state": "ring", "window": 3}, "needs causal attention with a window"),
        ({"alibi": True, "rotary": Rotary(6)}, "choose one kind of positions"),
    ):
        with pytest.raises(ValueError, match=message):
            MultiHeadAttention(24, 4, **options)


class TestCrossAttention:
    def crossed(self, attention, x, memory, valid=None, **options):
        return attention(x, attention.project(memory), valid, **options)

    def test_it_equals_torch_multihead_attention_over_a_memory_of_another_width(self):
        reference = nn.MultiheadAttention(24, 4, kdim=10, vdim=10, batch_first=True).double().eval()
        ours = CrossAttention(24, 4, d_memory=10, qkv_bias=True, output_bias=True).double().eval()
        reference.in_proj_bias.data.normal_()
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        with torch.no_grad():
            for linear, name, bias in zip(
                (ours.query, ours.key, ours.value), names, reference.in_proj_bias.chunk(3), strict=True
            ):
                linear.weight.copy_(getattr(reference, name))
                linear.bias.copy_(bias)
            ours.output.load_state_dict(reference.out_proj.state_dict())
        x, memory = torch.randn(3, 5, 24, dtype=torch.float64), torch.randn(3, 7, 10, dtype=torch.float64)
        valid = torch.arange(7) < torch.tensor([[7], [2], [5]])
        expected, weights = reference(
            x, memory, memory, key_padding_mask=~valid, need_weights=True, average_attn_weights=False
        )
        actual = self.crossed(ours, x, memory, valid, need_weights=True)
        torch.testing.assert_close(actual.output, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(actual.weights, weights, rtol=0, atol=1e-10)
        torch.testing.assert_close(self.crossed(ours, x, memory, valid).output, expected, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("need_weights", [False, True])
    def test_padded_memory_may_hold_anything_and_an_empty_one_gives_zero(self, need_weights, dtype):
        attention = CrossAttention(24, 4, num_kv_heads=2, d_memory=10).to(dtype)
        x, memory = torch.randn(3, 5, 24).to(dtype), torch.randn(3, 7, 10).to(dtype)
        valid = torch.arange(7) < torch.tensor([[7], [0], [4]])
        clean = self.crossed(attention, x, memory.masked_fill(~valid[..., None], 0.0), valid, need_weights=need_weights)
        for garbage in (math.nan, math.inf, 6e4):
            dirty = memory.masked_fill(~valid[..., None], garbage)
            actual = self.crossed(attention, x, dirty, valid, need_weights=need_weights)
            assert torch.equal(actual.output, clean.output)
            assert (actual.output[1] == 0).all()
        if need_weights:
            assert (actual.weights[1] == 0).all()
            assert (actual.weights[2, ..., 4:] == 0).all()

    def test_gradients_stay_finite_beside_garbage_and_pass_gradcheck(self):
        attention = CrossAttention(4, 2, qk_norm=True, softcap=3.0).double()
        valid = torch.tensor([[True, True, False], [False] * 3])
        memory = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        x = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, m: self.crossed(attention, x, m, valid).output, (x, memory))
        projected = {
            name: tensor.masked_fill(~valid[:, None, :, None], math.nan)
            for name, tensor in attention.project(memory).items()
        }
        attention(x, projected, valid).output.square().sum().backward()
        for tensor in (x, memory, attention.key.weight, attention.value.weight, attention.query.weight):
            assert tensor.grad.isfinite().all()

    def test_the_order_of_memory_means_nothing(self):
        attention = CrossAttention(24, 4).double()
        x, memory = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 7, 24, dtype=torch.float64)
        valid, order = torch.arange(7) < torch.tensor([[7], [3]]), torch.randperm(7)
        expected = self.crossed(attention, x, memory, valid).output
        actual = self.crossed(attention, x, memory[:, order], valid[:, order]).output
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)

    def test_rows_alone_equal_rows_in_a_batch_of_mixed_lengths(self):
        attention = CrossAttention(24, 4, num_kv_heads=1, normalizer=entmax15, softcap=5.0, qk_norm=True).double()
        x, memory = torch.randn(3, 5, 24, dtype=torch.float64), torch.randn(3, 7, 24, dtype=torch.float64)
        lengths = torch.tensor([7, 1, 4])
        together = self.crossed(attention, x, memory, torch.arange(7) < lengths[:, None]).output
        for row, length in enumerate(lengths.tolist()):
            alone = self.crossed(attention, x[row : row + 1], memory[row : row + 1, :length]).output
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-10)

    def test_an_empty_memory_or_no_query_keeps_the_shape(self):
        attention = CrossAttention(24, 4)
        for queries, keys in ((5, 0), (0, 7), (0, 0)):
            output = self.crossed(attention, torch.randn(2, queries, 24), torch.randn(2, keys, 24)).output
            assert output.shape == (2, queries, 24)
            assert (output == 0).all()

    def test_the_memory_is_a_fixed_state_as_long_as_the_source(self):
        attention = CrossAttention(24, 4, num_kv_heads=2, d_memory=10)
        specs = attention.state_specs()
        assert [(spec.name, spec.rule, spec.shape) for spec in specs] == [
            ("key", StateRule.FIXED, (2, SOURCE, 6)),
            ("value", StateRule.FIXED, (2, SOURCE, 6)),
        ]
        projected = attention.project(torch.randn(3, 7, 10))
        assert {name: tuple(tensor.shape[1:]) for name, tensor in projected.items()} == {
            spec.name: spec.row_shape(1, 7) for spec in specs
        }
        assert attention(torch.randn(3, 5, 24), projected).present == {}
