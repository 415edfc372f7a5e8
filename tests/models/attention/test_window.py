"""Sliding windows: the blocked path against the masked dense one and against transformers; rings against one pass."""

import math

import pytest
import torch

from models.attention.functional import allow, attend, attend_causally
from models.attention.multihead import MultiHeadAttention
from models.attention.positions import Rotary
from models.attention.window import BLOCK, SharedKeys, window_attend
from models.states import Chunk, StateRule

LENGTHS = [0, 1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, 150]
SIDES = [(0, 0), (1, 0), (5, 0), (40, 0), (200, 0), (3, 3), (40, 40), (0, 4), (7, 2)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(tokens, *, rows=2, heads=4, kv_heads=2, head_dim=8, value_dim=6, dtype=torch.float64):
    return (
        torch.randn(rows, heads, tokens, head_dim, dtype=dtype),
        torch.randn(rows, kv_heads, tokens, head_dim, dtype=dtype),
        torch.randn(rows, kv_heads, tokens, value_dim, dtype=dtype),
    )


def dense(query, key, value, *, left, right, key_valid=None):
    positions = torch.arange(query.shape[2])[None]
    mask = allow(positions, positions, left=left, right=right, key_valid=key_valid)
    return attend(query, key, value, mask)[0]


class TestWindowAttend:
    @pytest.mark.parametrize(("left", "right"), SIDES)
    @pytest.mark.parametrize("tokens", LENGTHS)
    def test_it_equals_masked_dense_attention(self, tokens, left, right):
        query, key, value = inputs(tokens)
        output = window_attend(query, key, value, left=left, right=right)
        torch.testing.assert_close(output, dense(query, key, value, left=left, right=right), rtol=0, atol=1e-10)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
    @pytest.mark.parametrize(("left", "right"), [(5, 0), (40, 40)])
    def test_padding_of_any_content_is_hidden_for_any_grouping(self, heads, kv_heads, left, right):
        query, key, value = inputs(100, rows=3, heads=heads, kv_heads=kv_heads)
        valid = torch.arange(100) < torch.tensor([100, 41, 0])[:, None]
        valid[0, 13] = False  # not only at the end
        expected = dense(query, key, value, left=left, right=right, key_valid=valid)
        hidden = ~valid[:, None, :, None].expand(-1, kv_heads, -1, -1)
        output = window_attend(
            query,
            key.masked_fill(hidden, math.nan),
            value.masked_fill(hidden, math.inf),
            left=left,
            right=right,
            key_valid=valid,
        )
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
        assert (output[2] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_every_dtype_stays_near_double_precision(self, dtype):
        exact = inputs(100)
        output = window_attend(*(tensor.to(dtype) for tensor in exact), left=9, right=0)
        assert output.dtype == dtype
        atol = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(output.double(), dense(*exact, left=9, right=0), rtol=0, atol=atol)

    @pytest.mark.parametrize("scale", [0.3, None])
    def test_shared_keys_are_seen_by_every_query_beside_its_window(self, scale):
        query, key, value = inputs(100)
        shared_key, shared_value = torch.randn(2, 2, 3, 8).double(), torch.randn(2, 2, 3, 6).double()
        valid = torch.tensor([[True, False, True], [False] * 3])
        output = window_attend(
            query, key, value, left=9, right=4, shared=SharedKeys(shared_key, shared_value, valid), scale=scale
        )
        positions = torch.arange(100)[None]
        mask = allow(positions, positions, left=9, right=4).expand(2, -1, -1, -1)
        mask = torch.cat((mask, valid[:, None, None].expand(-1, -1, 100, -1)), 3)
        expected, _ = attend(
            query, torch.cat((key, shared_key), 2), torch.cat((value, shared_value), 2), mask, scale=scale
        )
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)

    def test_gradients_pass_gradcheck_and_stay_within_the_window(self):
        query, key, value = (tensor.requires_grad_() for tensor in inputs(7, rows=1, head_dim=2, value_dim=2))
        assert torch.autograd.gradcheck(
            lambda *tensors: window_attend(*tensors, left=2, right=1), (query, key, value), fast_mode=True
        )
        query, key, value = (tensor.requires_grad_() for tensor in inputs(100))
        output = window_attend(query, key, value, left=3, right=0)
        for gradient in torch.autograd.grad(output[:, :, 50].sum(), (key, value)):
            reached = (gradient != 0).any(-1).any(1)[0].nonzero().flatten().tolist()
            assert reached == [47, 48, 49, 50]

    def test_dropout_keeps_the_expectation(self):
        query, key, value = (tensor.expand(2000, -1, -1, -1) for tensor in inputs(40, rows=1, dtype=torch.float32))
        exact = window_attend(query[:1], key[:1], value[:1], left=5, right=0)
        dropped = window_attend(query, key, value, left=5, right=0, dropout=0.3)
        torch.testing.assert_close(dropped.mean(0), exact[0], rtol=0, atol=0.12)
        assert not torch.equal(dropped[0], dropped[1])


def chunk_of(x, lengths=None, start=None):
    start = None if start is None else torch.tensor(start)
    return Chunk.of(x[..., 0], None if lengths is None else torch.tensor(lengths), start)


def layer_of(window, window_state="append", **options):
    torch.manual_seed(1)
    options = {"num_kv_heads": 2, "causal": True, "rotary": Rotary(6)} | options
    return MultiHeadAttention(24, 4, window=window, window_state=window_state, **options).double().eval()


class TestWindowedLayer:
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("window", [1, 2, 5, 40])
    @pytest.mark.parametrize("tokens", [3, 4 * BLOCK, 4 * BLOCK + 1, 200])
    def test_blocks_equal_the_path_that_returns_weights(self, tokens, window, causal):
        attention, x = layer_of(window, causal=causal), torch.randn(2, tokens, 24, dtype=torch.float64)
        chunk = chunk_of(x, [tokens, tokens // 2])
        dense = attention(x, chunk, need_weights=True)
        torch.testing.assert_close(attention(x, chunk).output, dense.output, rtol=0, atol=1e-10)
        seen = (dense.weights[0, 0] > 0).sum(-1)
        expected = [min(t + 1, window) + (0 if causal else min(tokens - 1 - t, window - 1)) for t in range(tokens)]
        assert seen.tolist() == expected

    @pytest.mark.parametrize("window", [1, 3, 8])
    def test_a_window_counts_its_tokens_as_transformers_does(self, window):
        from transformers import MistralConfig
        from transformers.masking_utils import create_sliding_window_causal_mask

        config = MistralConfig(sliding_window=window, attn_implementation="sdpa")
        x = torch.randn(1, 20, 24, dtype=torch.float64)
        theirs = create_sliding_window_causal_mask(
            config=config,
            inputs_embeds=x,
            attention_mask=torch.ones(1, 20, dtype=torch.int64),
            past_key_values=None,
            position_ids=torch.arange(20)[None],
        )
        weights = layer_of(window)(x, chunk_of(x), need_weights=True).weights
        assert torch.equal((weights > 0)[0, 0], theirs[0, 0].bool())


def empty(attention, rows, capacity):
    return {
        spec.name: torch.zeros(rows, *spec.row_shape(capacity), dtype=torch.float64) for spec in attention.state_specs()
    }


class TestRing:
    @pytest.mark.parametrize("alibi", [False, True])
    @pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 64])
    @pytest.mark.parametrize("seed", range(4))
    @torch.no_grad()
    def test_ring_and_append_and_one_pass_agree_for_ragged_rows(self, seed, window, alibi):
        options = {"alibi": True, "rotary": None} if alibi else {}
        ring, grown = layer_of(window, "ring", **options), layer_of(window, **options)
        x, generator = torch.randn(4, 40, 24, dtype=torch.float64), torch.Generator().manual_seed(seed)
        states = {"ring": empty(ring, 4, 40), "append": empty(grown, 4, 40)}
        consumed, outputs = [0] * 4, [[] for _ in range(4)]
        while min(consumed) < 40:
            width = int(torch.randint(1, 13, (), generator=generator))  # chunks beyond the window too
            lengths = [min(int(torch.randint(0, width + 1, (), generator=generator)), 40 - n) for n in consumed]
            new = torch.full((4, width, 24), math.nan, dtype=torch.float64)  # padding may hold anything
            for row, (start, length) in enumerate(zip(consumed, lengths, strict=True)):
                new[row, :length] = x[row, start : start + length]
            chunk = chunk_of(new, lengths, consumed)
            attended = {
                "ring": ring(new, chunk, states["ring"]),
                "append": grown(new, chunk, states["append"]),
            }
            for row, length in enumerate(lengths):
                one, other = (attended[name].output[row, :length] for name in ("ring", "append"))
                torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
                outputs[row].append(one)
                consumed[row] += length
                if length == 0:
                    for name, tensor in attended["ring"].present.items():
                        assert torch.equal(tensor[row], states["ring"][name][row])
            states = {name: result.present for name, result in attended.items()}
        for row in range(4):
            alone = grown(x[row : row + 1], chunk_of(x[row : row + 1])).output[0]
            torch.testing.assert_close(torch.cat(outputs[row]), alone, rtol=0, atol=1e-10)

    @torch.no_grad()
    def test_weights_over_a_ring_are_those_of_one_pass_in_the_order_of_slots_then_tokens(self):
        attention, x = layer_of(3, "ring"), torch.randn(1, 9, 24, dtype=torch.float64)
        first = attention(x[:, :7], chunk_of(x[:, :7]), empty(attention, 1, 9))
        second = attention(x[:, 7:], chunk_of(x[:, 7:], start=[7]), first.present, need_weights=True)
        whole = attention(x, chunk_of(x), need_weights=True).weights[:, :, 7:]
        held = [6, 4, 5]  # position p lies in slot p modulo 3
        torch.testing.assert_close(second.weights, whole[..., [*held, 7, 8]], rtol=0, atol=1e-10)

    def test_the_ring_holds_a_window_and_the_appended_state_names_what_may_be_released(self):
        for spec in layer_of(5, "ring").state_specs():
            assert (spec.rule, spec.shape, spec.window, spec.bytes_per_token) == (StateRule.RING, (2, 5, 6), 5, 0)
        for spec in layer_of(5).state_specs():
            assert (spec.rule, spec.shape, spec.window) == (StateRule.APPEND, (2, "capacity", 6), 5)

    def test_misuse_is_refused_with_advice(self):
        for options in ({"window": None}, {"window": 4, "causal": False}):
            with pytest.raises(ValueError, match="'ring', which needs causal attention with a window"):
                layer_of(window_state="ring", **options)
        with pytest.raises(ValueError, match="window_state is 'circle'; it must be append or ring"):
            layer_of(4, "circle")
        with pytest.raises(ValueError, match="window is 0; it must be at least 1, the token itself"):
            layer_of(0)
        x = torch.randn(1, 3, 24, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"is_global marks tokens .* they need attention 'longformer'"):
            layer_of(4)(x, Chunk.of(x[..., 0], is_global=torch.ones(1, 3, dtype=torch.bool)))


class TestAttendCausally:
    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
    @pytest.mark.parametrize("tokens", [0, 1, 7, 200])
    def test_it_equals_attention_under_a_causal_mask(self, tokens, heads, kv_heads):
        query, key, value = inputs(tokens, rows=3, heads=heads, kv_heads=kv_heads)
        lengths = torch.tensor([tokens, tokens // 2, 0])[:, None]
        valid = torch.arange(tokens) < lengths
        expected = dense(query, key, value, left=tokens, right=0, key_valid=valid)
        hidden = ~valid[:, None, :, None].expand(-1, kv_heads, -1, -1)
        output = attend_causally(
            query, key.masked_fill(hidden, math.nan), value.masked_fill(hidden, math.nan), key_valid=valid
        )
        for row, length in enumerate(lengths.flatten().tolist()):
            torch.testing.assert_close(output[row, :, :length], expected[row, :, :length], rtol=0, atol=1e-10)
        assert output.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_every_dtype_stays_near_double_precision(self, dtype):
        exact = inputs(100)
        output = attend_causally(*(tensor.to(dtype) for tensor in exact))
        atol = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(output.double(), dense(*exact, left=100, right=0), rtol=0, atol=atol)
        assert attend_causally(*(torch.full((1, 2, 9, 64), 40.0, dtype=dtype) for _ in range(3))).isfinite().all()

    def test_no_gradient_reaches_a_later_token(self):
        query, key, value = (tensor.requires_grad_() for tensor in inputs(20))
        output = attend_causally(query, key, value)
        for gradient in torch.autograd.grad(output[:, :, 11].sum(), (key, value)):
            assert (gradient[:, :, 12:] == 0).all()
            assert (gradient[:, :, :12] != 0).any(-1).all()
