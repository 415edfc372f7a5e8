"""Encoder-decoders: step by step against one pass, padded sources, what is read twice and made once."""

import math

import pytest
import torch

from models.decoder import DecoderConfig
from models.encoder import EncoderConfig, StackConfig
from models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from models.states import StateRule

SIZES = {"d_model": 24, "num_layers": 2, "num_heads": 4, "d_ff": 40}
DECODER = {
    **SIZES, "vocab_size": 30, "num_kv_heads": 2, "head_dim": 8, "max_model_len": 32, "norm": "layer", "norm_eps": 1e-5,
    "activation": "gelu", "bias": "all", "tie_embeddings": True,
}  # fmt: skip
VARIANTS = {
    "vaswani": ({"positions": "sinusoidal", "scale_embeddings": True, "norm_first": False}, {"norm_first": False}),
    "rotary": ({"positions": "rotary", "qk_norm": True, "softcap": 20.0}, {"positions": "rotary"}),
    "alibi": ({"positions": "alibi"}, {"positions": "alibi"}),
    "ring": ({"positions": "rotary", "window": 3, "window_state": "ring"}, {"window": 2}),
    "favor": ({"positions": "rotary", "attention": "favor", "num_features": 16}, {"attention": "elu"}),
    "mean": ({"positions": "learned", "attention": "mean"}, {"attention": "mean"}),
}
ALL = pytest.mark.parametrize("variant", VARIANTS)


def config_of(variant, **changes):
    decoder, stack = VARIANTS[variant]
    encoder = EncoderConfig(vocab_size=20, max_source_len=16, positions="learned", stack=StackConfig(**SIZES, **stack))
    return EncoderDecoderConfig(encoder=encoder, decoder=DecoderConfig(**DECODER | decoder | changes))


def model_of(variant):
    torch.manual_seed(0)
    model = EncoderDecoder(config_of(variant)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(vocab_size, *shape):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def assert_same(actual, expected):
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@ALL
@torch.no_grad()
def test_ragged_targets_step_by_step_equal_each_alone_in_one_pass(variant):
    model, source, target = model_of(variant), tokens(20, 3, 9), tokens(30, 3, 14)
    source_lengths = torch.tensor([9, 4, 1])
    state, parts = model.begin(model.encode(source, source_lengths), source_lengths, 20), [[], [], []]
    for lengths in ([7, 1, 0], [0, 1, 1], [1, 9, 5], [6, 3, 8]):
        chunk = tokens(30, 3, max(lengths))
        for row, length in enumerate(lengths):
            chunk[row, :length] = target[row, state.lengths[row] : state.lengths[row] + length]
        logits, state = model.decode(chunk, state, torch.tensor(lengths))
        for row, length in enumerate(lengths):
            parts[row].append(logits[row, :length])
    assert state.lengths.tolist() == [14] * 3
    whole = model(source, target, source_lengths)
    for row, length in enumerate(source_lengths.tolist()):
        alone = model(source[row : row + 1, :length], target[row : row + 1])[0]
        assert_same(torch.cat(parts[row]), alone)
        assert_same(whole[row], alone)


@ALL
@torch.no_grad()
def test_a_source_of_nothing_is_harmless_and_padding_that_is_nan_does_not_leak(variant):
    model, source, target = model_of(variant), tokens(20, 3, 9), tokens(30, 3, 6)
    lengths = torch.tensor([9, 0, 4])
    expected = model(source, target, lengths)
    assert expected.isfinite().all()
    assert_same(expected[2:], model(source[2:, :4], target[2:]))
    memory = model.encode(source, lengths)
    memory[1], memory[2, 4:] = math.nan, math.inf
    logits, _ = model.decode(target, model.begin(memory, lengths, 6))
    assert_same(logits, expected)


@ALL
@torch.no_grad()
def test_beams_are_reordered_with_their_sources(variant):
    model, source, target = model_of(variant), tokens(20, 3, 9), tokens(30, 3, 8)
    source_lengths, order = torch.tensor([9, 4, 1]), torch.tensor([2, 0, 2, 1])
    _, state = model.decode(target[:, :5], model.begin(model.encode(source, source_lengths), source_lengths, 8))
    logits, _ = model.decode(target[order, 5:], state.select(order))
    for row, index in enumerate(order.tolist()):
        alone = model(source[index : index + 1, : source_lengths[index]], target[index : index + 1])
        assert_same(logits[row], alone[0, 5:])


@torch.no_grad()
def test_keys_of_the_memory_are_made_once_and_declared_as_fixed():
    model, source, target = model_of("rotary"), tokens(20, 2, 9), tokens(30, 2, 8)
    calls = []
    for layer in model.decoder.layers:
        layer.cross_attention.key.register_forward_hook(lambda *_: calls.append(None))
    state = model.begin(model.encode(source))
    for position in range(8):
        _, state = model.decode(target[:, position : position + 1], state)
    assert len(calls) == 2
    rules = {spec.name: spec.rule for spec in model.decoder.state_specs()}
    assert rules == {
        f"{layer}.{prefix}{name}": rule
        for layer in range(2)
        for prefix, rule in (("", StateRule.APPEND), ("cross.", StateRule.FIXED))
        for name in ("key", "value")
    }


@torch.no_grad()
def test_no_logit_depends_on_a_later_target_and_each_on_the_whole_source():
    model, source, target = model_of("vaswani"), tokens(20, 1, 5), tokens(30, 1, 6)
    expected = model(source, target)
    for position in range(6):
        changed = target.clone()
        changed[0, position] = (changed[0, position] + 1) % 30
        logits = model(source, changed)
        assert torch.equal(logits[0, :position], expected[0, :position])
        assert (logits[0, position:] != expected[0, position:]).any(-1).all()
    for position in range(5):
        changed = source.clone()
        changed[0, position] = (changed[0, position] + 1) % 20
        assert (model(changed, target) != expected).any(-1).all()


@torch.no_grad()
def test_weights_of_all_three_kinds_are_those_of_valid_places():
    model, source, target = model_of("vaswani"), tokens(20, 2, 9), tokens(30, 2, 6)
    lengths = torch.tensor([9, 4])
    weights = model.attention_weights(source, target, lengths)
    assert [tuple(layer.shape) for layer in weights.encoder] == [(2, 4, 9, 9)] * 2
    assert [tuple(layer.shape) for layer in weights.decoder] == [(2, 4, 6, 6)] * 2
    assert [tuple(layer.shape) for layer in weights.cross] == [(2, 4, 6, 9)] * 2
    for layer, alone in zip(
        weights.cross, model.cross_attention_weights(source, target, lengths), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(layer, alone)
        torch.testing.assert_close(layer.sum(-1), torch.ones(2, 4, 6))
        assert (layer[1, ..., 4:] == 0).all()


@torch.no_grad()
def test_cross_attention_has_weights_where_self_attention_has_none():
    model, source, target = model_of("favor"), tokens(20, 2, 9), tokens(30, 2, 6)
    for layer in model.cross_attention_weights(source, target):
        torch.testing.assert_close(layer.sum(-1), torch.ones(2, 4, 6))
    with pytest.raises(ValueError, match="ask a model with attention 'softmax'"):
        model.attention_weights(source, target)


def test_both_sides_may_share_their_embeddings_and_weights_come_back_tied():
    config = config_of("vaswani", vocab_size=20)
    shared = EncoderDecoderConfig(encoder=config.encoder, decoder=config.decoder, share_embeddings=True)
    torch.manual_seed(0)
    model = EncoderDecoder(shared).eval()
    assert set(model.tied_names) == {"decoder.lm_head.weight", "encoder.token_embedding.weight"}
    again = EncoderDecoder.from_weights(shared, model.weights())
    assert again.encoder.token_embedding.weight is again.decoder.lm_head.weight
    source, target = tokens(20, 2, 9), tokens(20, 2, 6)
    assert torch.equal(again(source, target), model(source, target))
    with pytest.raises(ValueError, match=r"\(vocab_size, d_model\) \(20, 24\) must be the decoder's \(30, 24\)"):
        EncoderDecoderConfig(encoder=config.encoder, decoder=config_of("vaswani").decoder, share_embeddings=True)
