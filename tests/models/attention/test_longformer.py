"""Longformer attention against a dense formula for any length, and against transformers."""

import math

import pytest
import torch

from models.attention.longformer import LongformerAttention
from models.attention.positions import Rotary
from models.decoder_config import DecoderConfig
from models.encoder import Encoder, EncoderConfig, StackConfig
from models.states import Chunk


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def layer_of(window, **options):
    return LongformerAttention(24, 4, window=window, **options).double().eval()


def chunk_of(x, lengths, is_global):
    return Chunk.of(x[..., 0], torch.tensor(lengths), is_global=is_global)


def dense(attention, x, lengths, is_global, window):
    """Output and weights by the definition, one query at a time."""
    rows, tokens, _ = x.shape
    rotate = attention.rotary or (lambda x, _: x)
    positions = torch.arange(tokens)[None]

    def project(layer, heads):
        return layer(x).unflatten(-1, (heads, attention.head_dim)).transpose(1, 2)

    def all_three(query, key, value):
        query, key = project(query, attention.num_heads), project(key, attention.num_kv_heads)
        key, value = (
            tensor.repeat_interleave(attention.num_heads // attention.num_kv_heads, 1)
            for tensor in (rotate(key, positions), project(value, attention.num_kv_heads))
        )
        return rotate(query, positions), key, value

    local = all_three(attention.query, attention.key, attention.value)
    wide = all_three(attention.global_query, attention.global_key, attention.global_value)
    context = torch.zeros(rows, attention.num_heads, tokens, attention.head_dim, dtype=x.dtype)
    weights = torch.zeros(rows, attention.num_heads, tokens, tokens, dtype=x.dtype)
    for row, length in enumerate(lengths):
        for t in range(length):
            marked = is_global[row].nonzero().flatten().tolist()
            keys = [s for s in range(length) if is_global[row, t] or abs(s - t) <= window // 2 or s in marked]
            query, key, value = wide if is_global[row, t] else local
            scores = torch.einsum("hd,hsd->hs", query[row, :, t], key[row][:, keys]) / math.sqrt(attention.head_dim)
            weights[row, :, t, keys] = scores.softmax(-1)
            context[row, :, t] = torch.einsum("hs,hsd->hd", weights[row, :, t, keys], value[row][:, keys])
    return attention.output(context.transpose(1, 2).flatten(2)), weights


def some_global(rows, tokens, seed=0):
    """Rows with none, one and many global tokens."""
    shares = torch.tensor([0.0, 1 / max(tokens, 1), 0.3])[torch.arange(rows) % 3][:, None]
    return torch.rand(rows, tokens, generator=torch.Generator().manual_seed(seed)) < shares


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "qkv_bias": True}, {"rotary": Rotary(6)}], ids=str)
@pytest.mark.parametrize("window", [2, 8, 50])
@pytest.mark.parametrize("tokens", [1, 7, 33, 70])
@torch.no_grad()
def test_it_equals_the_dense_definition_for_any_length(tokens, window, options):
    attention, x = layer_of(window, **options), torch.randn(3, tokens, 24, dtype=torch.float64)
    is_global, lengths = some_global(3, tokens), [tokens, (tokens + 1) // 2, tokens]
    expected, weights = dense(attention, x, lengths, is_global, window)
    chunk = chunk_of(x, lengths, is_global)
    fast, explained = attention(x, chunk), attention(x, chunk, need_weights=True)
    torch.testing.assert_close(fast.output, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(explained.output, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(explained.weights, weights, rtol=0, atol=1e-10)
    assert fast.weights is None


@pytest.mark.parametrize("window", [4, 16])
@torch.no_grad()
def test_it_equals_transformers(window):
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=24, num_attention_heads=4, attention_window=[window], attention_probs_dropout_prob=0.0
    )
    theirs = LongformerSelfAttention(config, layer_id=0).eval()
    ours = LongformerAttention(24, 4, window=window, qkv_bias=True).eval()
    for name in ("query", "key", "value"):
        getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
        getattr(ours, f"global_{name}").load_state_dict(getattr(theirs, f"{name}_global").state_dict())
    ours.output.weight.copy_(torch.eye(24))  # theirs is a module of its own
    tokens, lengths = 48, [48, 29, 40]  # theirs needs a multiple of the window
    x, is_global = torch.randn(3, tokens, 24), some_global(3, tokens)
    is_global[:, 0] = True
    chunk = chunk_of(x, lengths, is_global)
    padding = ~chunk.valid
    mask = torch.where(padding, -10000.0, torch.where(is_global, 10000.0, 0.0))
    marked = is_global & ~padding
    (expected,) = theirs(
        x,
        attention_mask=mask,
        is_index_masked=padding,
        is_index_global_attn=marked,
        is_global_attn=True,
    )
    torch.testing.assert_close(ours(x, chunk).output, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(ours(x, chunk, need_weights=True).output, expected, rtol=0, atol=2e-6)


@torch.no_grad()
def test_padding_of_any_content_changes_nothing_and_reads_zero():
    attention, x = layer_of(8), torch.randn(3, 40, 24, dtype=torch.float64)
    is_global, lengths = some_global(3, 40), [40, 23, 0]
    poisoned = x.clone()
    for row, length in enumerate(lengths):
        poisoned[row, length:] = math.nan
    for need_weights in (False, True):
        clean = attention(x, chunk_of(x, lengths, is_global), need_weights=need_weights)
        dirty = attention(
            poisoned, chunk_of(x, lengths, is_global | (torch.arange(40) > 30)), need_weights=need_weights
        )
        for row, length in enumerate(lengths):
            assert (clean.output[row, length:] == 0).all()
            assert (dirty.output[row, length:] == 0).all()
        torch.testing.assert_close(dirty.output[1, :23], clean.output[1, :23], rtol=0, atol=1e-10)
        if need_weights:
            assert (dirty.weights[1, :, 23:] == 0).all()
            assert (dirty.weights[1, ..., 23:] == 0).all()
            assert (dirty.weights[2] == 0).all()


@torch.no_grad()
def test_without_global_tokens_it_is_a_window_and_with_all_of_them_full_attention():
    attention, x = layer_of(6), torch.randn(2, 30, 24, dtype=torch.float64)
    none, every = torch.zeros(2, 30, dtype=torch.bool), torch.ones(2, 30, dtype=torch.bool)
    unmarked = attention(x, Chunk.of(x[..., 0])).output
    torch.testing.assert_close(attention(x, chunk_of(x, [30, 30], none)).output, unmarked, rtol=0, atol=0)
    full = attention(x, chunk_of(x, [30, 30], every), need_weights=True)
    assert (full.weights > 0).all()
    torch.testing.assert_close(attention(x, chunk_of(x, [30, 30], every)).output, full.output, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_every_dtype_stays_near_double_precision(dtype):
    exact, x = layer_of(8), torch.randn(3, 70, 24, dtype=torch.float64)
    attention = LongformerAttention(24, 4, window=8).to(dtype).eval()
    attention.load_state_dict(exact.state_dict())
    chunk = chunk_of(x, [70, 35, 70], some_global(3, 70))
    output = attention(x.to(dtype), chunk).output
    assert output.dtype == dtype
    atol = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(output.double(), exact(x, chunk).output, rtol=0, atol=atol)


def test_gradients_reach_what_was_seen_and_both_kinds_of_projections():
    attention = LongformerAttention(8, 2, window=2).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64, requires_grad=True)
    chunk = chunk_of(x, [9], torch.arange(9)[None] == 4)
    assert torch.autograd.gradcheck(lambda x: attention(x, chunk).output, (x,), fast_mode=True)
    (gradient,) = torch.autograd.grad(attention(x, chunk).output[0, 0].sum(), x)
    assert (gradient[0] != 0).any(-1).tolist() == [t in (0, 1, 4) for t in range(9)]
    attention(x, chunk).output.square().sum().backward()
    assert all((parameter.grad != 0).any() for parameter in attention.parameters())


def test_dropout_acts_in_training_only():
    attention, x = LongformerAttention(24, 4, window=4, dropout=0.5), torch.randn(2, 20, 24)
    chunk = chunk_of(x, [20, 20], some_global(2, 20))
    assert not torch.equal(attention(x, chunk).output, attention(x, chunk).output)
    attention.eval()
    assert torch.equal(attention(x, chunk).output, attention(x, chunk).output)


def stack(**options):
    return StackConfig(**{"d_model": 24, "num_layers": 2, "num_heads": 4, "d_ff": 32} | options)


def encoder_of(**options):
    config = EncoderConfig(vocab_size=30, max_source_len=64, positions="learned", stack=stack(**options))
    return Encoder(config).eval()


@torch.no_grad()
def test_an_encoder_carries_a_far_token_to_a_global_one_only():
    token_ids = torch.randint(30, (1, 60))
    other = token_ids.clone()
    other[0, 50] = (other[0, 50] + 1) % 30
    encoder, is_global = encoder_of(attention="longformer", window=4), torch.arange(60)[None] == 0
    assert not torch.equal(encoder(token_ids, is_global=is_global)[0, 0], encoder(other, is_global=is_global)[0, 0])
    assert torch.equal(encoder(token_ids)[0, 0], encoder(other)[0, 0])  # two windows do not reach so far
    assert encoder.attention_weights(token_ids, is_global=is_global)[0].shape == (1, 4, 60, 60)


def test_misuse_is_refused_with_advice():
    for window in (0, 1, 7):
        with pytest.raises(ValueError, match=f"window is {window}; it must be even and at least 2"):
            layer_of(window)
    x = torch.randn(1, 3, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match="a past needs causal attention, but global tokens see later ones"):
        layer_of(4)(x, chunk_of(x, [3], None), {"key": x})
    with pytest.raises(ValueError, match=r"window is None; attention 'longformer' needs an even one"):
        stack(attention="longformer")
    with pytest.raises(ValueError, match=r"window is 7; attention 'longformer' needs an even one"):
        stack(attention="longformer", window=7)
    with pytest.raises(ValueError, match="attention is 'longformer'; alibi needs 'softmax'"):
        stack(attention="longformer", window=8, positions="alibi")
    with pytest.raises(ValueError, match="attention is 'favor'; a window needs 'softmax' or 'longformer'"):
        stack(attention="favor", window=8)
    with pytest.raises(ValueError, match=r"is_global marks tokens .* they need attention 'longformer'"):
        encoder_of(window=4)(torch.zeros(1, 9, dtype=torch.int64), is_global=torch.ones(1, 9, dtype=torch.bool))


def test_a_causal_model_is_refused_global_tokens():
    sizes = {"vocab_size": 30, "d_model": 24, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4, "head_dim": 6}
    rest = {"d_ff": 32, "max_model_len": 64, "positions": "none", "norm": "rms", "norm_eps": 1e-5, "bias": "none"}
    with pytest.raises(ValueError, match="attention is 'longformer'; its global tokens see later ones"):
        DecoderConfig(**sizes, **rest, activation="gelu", tie_embeddings=True, attention="longformer", window=4)
