"""The encoder: parity with BERT, padding and neighbours, every kind of attention, configuration."""

import math

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from models.encoder import Encoder, EncoderConfig, StackConfig
from models.masked_lm import MaskedLanguageModel

STACK = {"d_model": 24, "num_layers": 3, "num_heads": 4, "d_ff": 40}
BASE = {"vocab_size": 40, "max_source_len": 32, "positions": "none"}
VARIANTS = {
    "bert": ({"positions": "learned", "num_segments": 2, "embedding_norm": True}, {"norm_first": False}),
    "sinusoidal": ({"positions": "sinusoidal", "scale_embeddings": True}, {"activation": "relu"}),
    "rotary": ({}, {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False, "qk_norm": True}),
    "alibi": ({}, {"positions": "alibi"}),
    "window": ({}, {"positions": "rotary", "window": 3}),
    "favor": ({}, {"positions": "rotary", "attention": "favor", "num_features": 16}),
    "elu": ({"positions": "learned"}, {"attention": "elu"}),
    "mean": ({"positions": "learned"}, {"attention": "mean"}),
}
ALL = pytest.mark.parametrize("variant", VARIANTS)
WITH_WEIGHTS = pytest.mark.parametrize("variant", ["bert", "sinusoidal", "rotary", "alibi", "window"])


def config_of(variant):
    base, stack = VARIANTS[variant]
    return EncoderConfig(**BASE | base, stack=StackConfig(**STACK | stack))


def encoder_of(variant):
    torch.manual_seed(0)
    encoder = Encoder(config_of(variant)).eval()
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return encoder


def tokens(*shape):
    return torch.randint(BASE["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def assert_same(actual, expected):
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def bert_config():
    return BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=32, type_vocab_size=2, hidden_act="gelu", layer_norm_eps=1e-12,
        attn_implementation="eager",
    )  # fmt: skip


def bert_weights(theirs):
    """Translate the weights of transformers' BERT, all drawn anew, into the names used here."""
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = theirs.state_dict()
    names = {
        "token_embedding": "embeddings.word_embeddings",
        "position_embedding": "embeddings.position_embeddings",
        "segment_embedding": "embeddings.token_type_embeddings",
        "embedding_norm": "embeddings.LayerNorm",
    }
    for index in range(3):
        ours, layer = f"stack.layers.{index}.", f"encoder.layer.{index}."
        names |= {
            f"{ours}attention.query": f"{layer}attention.self.query",
            f"{ours}attention.key": f"{layer}attention.self.key",
            f"{ours}attention.value": f"{layer}attention.self.value",
            f"{ours}attention.output": f"{layer}attention.output.dense",
            f"{ours}attention_norm": f"{layer}attention.output.LayerNorm",
            f"{ours}feed_forward.up": f"{layer}intermediate.dense",
            f"{ours}feed_forward.down": f"{layer}output.dense",
            f"{ours}feed_forward_norm": f"{layer}output.LayerNorm",
        }
    return {
        f"{ours}.{kind}": state[f"{name}.{kind}"]
        for ours, name in names.items()
        for kind in ("weight", "bias")
        if f"{name}.{kind}" in state
    }


def bert_encoder_config():
    base, stack = VARIANTS["bert"]
    return EncoderConfig(**BASE | base, stack=StackConfig(**STACK | stack, norm_eps=1e-12))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@torch.no_grad()
def test_it_equals_bert_of_transformers(dtype):
    torch.manual_seed(0)
    theirs = BertModel(bert_config(), add_pooling_layer=False).to(dtype).eval()
    ours = Encoder.from_weights(bert_encoder_config(), bert_weights(theirs))
    token_ids, segment_ids, lengths = tokens(3, 9), tokens(3, 9) % 2, torch.tensor([9, 2, 5])
    valid = torch.arange(9) < lengths[:, None]
    expected = theirs(token_ids, attention_mask=valid.long(), token_type_ids=segment_ids, output_attentions=True)
    actual = ours(token_ids, lengths, segment_ids=segment_ids)
    atol = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(actual[valid], expected.last_hidden_state[valid], rtol=0, atol=atol)
    for weights, reference in zip(
        ours.attention_weights(token_ids, lengths, segment_ids=segment_ids), expected.attentions, strict=True
    ):
        rows = valid[:, None].expand(-1, 4, -1)
        torch.testing.assert_close(weights[rows], reference[rows], rtol=0, atol=atol)
    plain = theirs(token_ids).last_hidden_state
    torch.testing.assert_close(ours(token_ids), plain, rtol=0, atol=atol)


@torch.no_grad()
def test_its_prediction_head_equals_that_of_bert():
    torch.manual_seed(0)
    theirs = BertForMaskedLM(bert_config()).double().eval()
    weights = {f"encoder.{name}": tensor for name, tensor in bert_weights(theirs.bert).items()}
    head = theirs.cls.predictions
    for parameter in (*head.transform.parameters(), head.decoder.bias):
        torch.nn.init.normal_(parameter)
    weights |= {f"head.dense.{name}": tensor for name, tensor in head.transform.dense.state_dict().items()}
    weights |= {f"head.norm.{name}": tensor for name, tensor in head.transform.LayerNorm.state_dict().items()}
    weights["head.output.bias"] = head.decoder.bias
    ours = MaskedLanguageModel.from_weights(bert_encoder_config(), weights)
    assert ours.head.output.weight is ours.encoder.token_embedding.weight
    token_ids, segment_ids, lengths = tokens(3, 9), tokens(3, 9) % 2, torch.tensor([9, 2, 5])
    valid = torch.arange(9) < lengths[:, None]
    expected = theirs(token_ids, attention_mask=valid.long(), token_type_ids=segment_ids).logits
    actual = ours(token_ids, lengths, segment_ids=segment_ids)
    torch.testing.assert_close(actual[valid], expected[valid], rtol=0, atol=1e-10)
    assert len(ours.attention_weights(token_ids, lengths)) == 3


@ALL
def test_every_place_depends_on_what_follows_and_on_what_precedes(variant):
    encoder, token_ids = encoder_of(variant), tokens(1, 5)
    embedded = encoder.token_embedding(token_ids).detach().requires_grad_()
    encoder.token_embedding.register_forward_hook(lambda *_: embedded)
    output = encoder(token_ids)
    for position in range(5):
        (gradient,) = torch.autograd.grad(output[0, position, 0], embedded, retain_graph=True)
        assert (gradient[0] != 0).any(-1).all()


@ALL
@torch.no_grad()
def test_padding_and_neighbours_change_nothing_and_an_empty_row_is_harmless(variant):
    encoder, token_ids = encoder_of(variant), tokens(3, 12)
    for width in (12, 17):
        padded = torch.cat((token_ids, tokens(3, width - 12)), 1)
        output = encoder(padded, torch.tensor([0, 5, 12]))
        assert output.isfinite().all()
        for row, length in ((1, 5), (2, 12)):
            assert_same(output[row, :length], encoder(token_ids[row : row + 1, :length])[0])


@ALL
@torch.no_grad()
def test_padding_that_is_nan_does_not_leak(variant):
    encoder, token_ids = encoder_of(variant), tokens(2, 12)
    expected = encoder(token_ids, torch.tensor([5, 12]))
    padding = torch.zeros(2, 12, 24)
    padding[0, 5:] = math.nan
    encoder.token_embedding.register_forward_hook(lambda module, given, output: output + padding)
    actual = encoder(token_ids, torch.tensor([5, 12]))
    assert torch.equal(actual[0, :5], expected[0, :5])
    assert torch.equal(actual[1], expected[1])


@ALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_other_precisions_stay_close_to_float32(variant, dtype):
    encoder, token_ids, lengths = encoder_of(variant), tokens(2, 12), torch.tensor([12, 7])
    expected = encoder(token_ids, lengths)
    actual = encoder.to(dtype)(token_ids, lengths)
    valid = torch.arange(12) < lengths[:, None]
    assert actual.dtype == dtype
    error = (actual.float() - expected)[valid].abs().max() / expected[valid].abs().max()
    assert error < {torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]


@pytest.mark.parametrize("attention", ["softmax", "favor", "elu", "mean"])
@torch.no_grad()
def test_without_positions_the_order_of_tokens_means_nothing(attention):
    torch.manual_seed(0)
    stack = StackConfig(**STACK, attention=attention)
    encoder = Encoder(EncoderConfig(**BASE, stack=stack)).eval()
    token_ids, order = tokens(2, 9), torch.randperm(9)
    assert_same(encoder(token_ids[:, order]), encoder(token_ids)[:, order])


@WITH_WEIGHTS
@torch.no_grad()
def test_attention_weights_are_those_the_output_used(variant):
    encoder, token_ids = encoder_of(variant), tokens(2, 9)
    weights = encoder.attention_weights(token_ids, torch.tensor([9, 4]))
    assert [tuple(layer.shape) for layer in weights] == [(2, 4, 9, 9)] * 3
    for layer in weights:
        assert (layer[1, ..., 4:] == 0).all()
        torch.testing.assert_close(layer[0].sum(-1), torch.ones(4, 9))
        if variant == "window":
            assert (layer[0].triu(3) == 0).all()
            assert (layer[0].tril(-3) == 0).all()
            assert (layer[0].diagonal(2, -2, -1) > 0).all()


def test_linear_attention_has_no_weights_and_says_where_to_find_some():
    with pytest.raises(ValueError, match="ask a model with attention 'softmax' for them"):
        encoder_of("elu").attention_weights(tokens(1, 4))


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="token_ids has 33 tokens; max_source_len is 32"):
        encoder_of("rotary")(tokens(1, 33))
    assert encoder_of("rotary")(tokens(2, 0)).shape == (2, 0, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 25}, "d_model is 25; it must be a multiple of num_heads, 4"),
        ({"num_layers": 0}, "num_layers is 0; it must be an integer of at least 1"),
        ({"window": 0}, "window is 0; it must be an integer of at least 1"),
        ({"norm_eps": 0.0}, r"norm_eps is 0\.0; it must be above 0"),
        ({"positions": "learned"}, "positions is 'learned'; it must be one of none, rotary, alibi"),
        ({"attention": "hard"}, "attention is 'hard'; it must be one of softmax"),
        ({"attention": "mean", "window": 3}, "attention is 'mean'; a window needs 'softmax'"),
        ({"attention": "elu", "positions": "alibi"}, "attention is 'elu'; alibi needs 'softmax'"),
    ],
)
def test_a_wrong_stack_names_field_value_and_limit(changes, message):
    with pytest.raises(ValueError, match=message):
        StackConfig(**STACK | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be an integer of at least 1"),
        ({"num_segments": -1}, "num_segments is -1; it must be an integer of at least 0"),
        ({"positions": "rotary"}, "positions is 'rotary'; it must be one of none, learned, sinusoidal"),
    ],
)
def test_a_wrong_encoder_names_field_value_and_limit(changes, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**BASE | changes, stack=StackConfig(**STACK))
