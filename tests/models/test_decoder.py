"""The decoder: causality, state against one pass, padding and neighbours, configuration."""

import pytest
import torch

from models.decoder import Decoder, DecoderConfig
from models.layers import RMSNorm
from models.states import StateRule

BASE = {
    "vocab_size": 40,
    "d_model": 24,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 40,
    "max_model_len": 48,
    "norm_eps": 1e-5,
}
LLAMA = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": "none", "tie_embeddings": True}
GPT2 = {"positions": "learned", "norm": "layer", "activation": "gelu_tanh", "bias": "all", "tie_embeddings": True}
VARIANTS = {
    "llama": LLAMA,
    "llama interleaved": LLAMA | {"rope_interleaved": True, "tie_embeddings": False},
    "gpt2": GPT2,
    "sinusoidal": GPT2 | {"positions": "sinusoidal", "activation": "relu", "bias": "qkv"},
    "multi-query": LLAMA | {"num_kv_heads": 1, "activation": "gelu"},
    "window": LLAMA | {"window": 5},
    "ring": LLAMA | {"window": 5, "window_state": "ring"},
    "performer": LLAMA | {"attention": "favor", "num_features": 16, "qk_norm": True},
    "elu": GPT2 | {"attention": "elu"},
}
ALL = pytest.mark.parametrize("variant", VARIANTS)


def decoder_of(variant):
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**(BASE | VARIANTS[variant]))).eval()
    for parameter in decoder.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return decoder


def tokens(*shape):
    return torch.randint(BASE["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def assert_same(actual, expected):
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@ALL
def test_no_logit_depends_on_a_later_token(variant):
    decoder, token_ids = decoder_of(variant), tokens(1, 9)
    embedded = decoder.token_embedding(token_ids).detach().requires_grad_()
    decoder.token_embedding.register_forward_hook(lambda *_: embedded)
    logits = decoder(token_ids)
    for position in range(9):
        (gradient,) = torch.autograd.grad(logits[0, position].sum(), embedded, retain_graph=True)
        assert (gradient[0, position + 1 :] == 0).all()
        assert (gradient[0, : position + 1] != 0).any(-1).all()


@ALL
@pytest.mark.parametrize("chunks", [[28], [1] * 28, [7, 1, 20], [27, 1], [0, 5, 0, 23]], ids=str)
@torch.no_grad()
def test_any_chunking_with_state_equals_one_pass(variant, chunks):
    decoder, token_ids = decoder_of(variant), tokens(2, 28)
    state, parts = decoder.initial_state(2, 30), []
    for chunk in token_ids.split(chunks, dim=1):
        logits, state = decoder(chunk, state)
        parts.append(logits)
    assert_same(torch.cat(parts, 1), decoder(token_ids))
    assert state.lengths.tolist() == [28, 28]


@ALL
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_ragged_rows_with_state_equal_each_row_alone(variant, seed):
    decoder, token_ids = decoder_of(variant), tokens(4, 40)
    generator = torch.Generator().manual_seed(seed)
    state, rows = decoder.initial_state(4, 40), [[] for _ in range(4)]
    while (room := 40 - state.lengths).max() > 0:
        width = int(torch.randint(1, 10, (), generator=generator))
        lengths = torch.minimum(torch.randint(0, width + 1, (4,), generator=generator), room)
        chunk = tokens(4, width)  # padding is some token, not a harmless one
        for row in range(4):
            start = int(state.lengths[row])
            chunk[row, : lengths[row]] = token_ids[row, start : start + lengths[row]]
        logits, state = decoder(chunk, state, lengths)
        for row in range(4):
            rows[row].append(logits[row, : lengths[row]])
    for row in range(4):
        assert_same(torch.cat(rows[row]), decoder(token_ids[row : row + 1])[0])


@ALL
@torch.no_grad()
def test_padding_and_neighbours_change_nothing_and_an_empty_row_is_harmless(variant):
    decoder, token_ids = decoder_of(variant), tokens(3, 12)
    logits = decoder(token_ids, lengths=torch.tensor([0, 5, 12]))
    assert logits.isfinite().all()
    for row, length in ((1, 5), (2, 12)):
        assert_same(logits[row, :length], decoder(token_ids[row : row + 1, :length])[0])


@ALL
@torch.no_grad()
def test_rows_of_a_state_can_be_reordered_and_repeated(variant):
    decoder, token_ids = decoder_of(variant), tokens(3, 10)
    _, state = decoder(token_ids[:, :6], decoder.initial_state(3, 10), torch.tensor([6, 4, 5]))
    order = torch.tensor([2, 0, 2])
    logits, _ = decoder(token_ids[:, 6:], state.select(order))
    for row, source in enumerate(order.tolist()):
        alone = torch.cat((token_ids[source, : [6, 4, 5][source]], token_ids[row, 6:]))[None]
        assert_same(logits[row], decoder(alone)[0, -4:])


@ALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_other_precisions_stay_close_to_float32_with_state_too(variant, dtype):
    decoder, token_ids = decoder_of(variant), tokens(2, 12)
    expected = decoder(token_ids)
    decoder.to(dtype)
    logits, state = decoder(token_ids[:, :7], decoder.initial_state(2, 12))
    later, state = decoder(token_ids[:, 7:], state)
    # Sums over a whole sequence are never kept in half precision.
    kept = dtype if decoder.config.attention == "softmax" else torch.promote_types(dtype, torch.float32)
    assert {tensor.dtype for tensor in state.tensors.values()} == {kept}
    assert logits.dtype == later.dtype == dtype
    error = (torch.cat((logits, later), 1).float() - expected).abs().max() / expected.abs().max()
    assert error < {torch.float64: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]


@torch.no_grad()
def test_a_step_leaves_the_state_it_was_given():
    decoder, token_ids = decoder_of("llama"), tokens(2, 8)
    _, state = decoder(token_ids[:, :5], decoder.initial_state(2, 8))
    copies = {name: tensor.clone() for name, tensor in state.tensors.items()}
    first, _ = decoder(token_ids[:, 5:], state)
    second, _ = decoder(token_ids[:, 5:], state)
    assert torch.equal(first, second)
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in copies.items())


def test_the_declared_states_say_what_is_kept():
    decoder = decoder_of("llama")
    specs = decoder.state_specs()
    assert [spec.name for spec in specs] == ["0.key", "0.value", "1.key", "1.value", "2.key", "2.value"]
    assert {(spec.rule, spec.dtype, spec.shape) for spec in specs} == {
        (StateRule.APPEND, torch.float32, (2, "capacity", 8))
    }
    assert sum(spec.bytes_per_token for spec in specs) == 3 * 2 * 2 * 8 * 4
    assert decoder.initial_state(5, 7).num_bytes == 5 * 7 * 3 * 2 * 2 * 8 * 4


@torch.no_grad()
def test_attention_weights_are_those_the_logits_used():
    decoder, token_ids = decoder_of("gpt2"), tokens(2, 9)
    weights, _ = decoder.attention_weights(token_ids, torch.tensor([9, 4]))
    assert [tuple(layer.shape) for layer in weights] == [(2, 6, 9, 9)] * 3
    for layer in weights:
        torch.testing.assert_close(layer.sum(-1), torch.ones(2, 6, 9))
        assert (layer.triu(1) == 0).all()
        assert (layer[1, ..., 4:] == 0).all()


def test_parameters_are_those_of_the_configuration():
    config = DecoderConfig(**(BASE | LLAMA))
    decoder = Decoder(config)
    per_layer = 24 * 48 + 2 * 24 * 16 + 48 * 24 + 3 * 24 * 40 + 2 * 24
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 40 * 24 + 3 * per_layer + 24
    assert decoder.lm_head.weight is decoder.token_embedding.weight
    assert decoder.layers[0].attention.output.weight.std() < 0.7 * decoder.layers[0].attention.query.weight.std()


@torch.no_grad()
def test_training_makes_it_forget_nothing_but_its_dropout():
    torch.manual_seed(0)
    decoder, token_ids = Decoder(DecoderConfig(**(BASE | GPT2)), dropout=0.5), tokens(2, 9)
    assert not torch.equal(decoder(token_ids), decoder(token_ids))
    plain = Decoder.from_weights(
        decoder.config, {name: t for name, t in decoder.state_dict().items() if name != "lm_head.weight"}
    )
    assert torch.equal(decoder.eval()(token_ids), plain(token_ids))


def test_sequences_beyond_the_limits_are_refused():
    decoder = decoder_of("gpt2")
    with pytest.raises(ValueError, match="token_ids has 49 tokens; max_model_len is 48"):
        decoder(tokens(1, 49))
    with pytest.raises(ValueError, match="max_model_len is 48"):
        decoder.attention_weights(tokens(1, 49))
    for capacity in (0, 49):
        with pytest.raises(ValueError, match=rf"capacity is {capacity}; it must lie in 1\.\.48"):
            decoder.initial_state(1, capacity)
    _, state = decoder(tokens(2, 8), decoder.initial_state(2, 10))
    with pytest.raises(ValueError, match="a row would hold 11 tokens; the state's capacity is 10"):
        decoder(tokens(2, 3), state, torch.tensor([1, 3]))
    for lengths, message in (([1, 9], r"must lie in 0\.\.8"), ([1, 2, 3], "token_ids has 2 rows"), ([-1, 2], "0..8")):
        with pytest.raises(ValueError, match=message):
            decoder(tokens(2, 8), lengths=torch.tensor(lengths))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size is 0; it must be an integer of at least 1"),
        ("d_ff", 2.5, "d_ff is 2.5; it must be an integer"),
        ("num_kv_heads", 4, "num_heads is 6; it must be a multiple of num_kv_heads, 4"),
        ("head_dim", 7, "head_dim is 7; rotary positions need an even one"),
        ("positions", "relative", "positions is 'relative'; it must be one of rotary, learned, sinusoidal"),
        ("norm", "batch", "norm is 'batch'; it must be one of rms, layer"),
        ("activation", "tanh", "activation is 'tanh'; it must be one of swiglu, gelu, gelu_tanh, relu"),
        ("bias", True, "bias is True; it must be one of none, qkv, all"),
        ("norm_eps", 0.0, r"norm_eps is 0\.0; it must be above 0"),
        ("rope_theta", -1.0, r"rope_theta is -1\.0; it must be above 0"),
    ],
)
def test_a_wrong_configuration_names_field_value_and_limit(field, value, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**(BASE | LLAMA | {field: value}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_equals_torch(dtype):
    torch.manual_seed(0)
    norm, reference = RMSNorm(16, 1e-5).to(dtype), torch.nn.RMSNorm(16, eps=1e-5, dtype=dtype)
    norm.weight.data.normal_()
    reference.weight.data.copy_(norm.weight)
    x = torch.randn(3, 16, dtype=dtype) * 100
    torch.testing.assert_close(norm(x), reference(x), rtol=2e-2 if dtype.itemsize == 2 else 1e-6, atol=0)
