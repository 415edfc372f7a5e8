"""Rewritten weights compute what they computed before, and their activations round better."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from export.calibration import measure_sizes
from export.rewrite import prepare_for_rounding, random_rotation
from export.text import CALIBRATION, tokens_of
from export.weights import Affine, DecoderWeights, decoder_weights
from models.checkpoint import TrainedModel
from models.decoder import Decoder


def rewritten(model: TrainedModel) -> DecoderWeights:
    text = tokens_of(CALIBRATION, model.tokenizer.json)
    return prepare_for_rounding(decoder_weights(model.module), measure_sizes(model.module, text))


def decoder_of(weights: DecoderWeights) -> Decoder:
    """A decoder with these weights: all norms are RMS norms, and everything may have a bias."""
    positions = "learned" if weights.positions is not None else weights.config.positions
    config = replace(weights.config, norm="rms", bias="all", tie_embeddings=False, positions=positions)
    decoder = Decoder(config)
    decoder.lm_head = nn.Linear(config.d_model, config.vocab_size)

    def put(linear: nn.Linear, each: Affine) -> None:
        linear.weight.copy_(each.weight)
        linear.bias.copy_(torch.zeros(len(each.weight)) if each.bias is None else each.bias)

    with torch.no_grad():
        decoder.token_embedding.weight.copy_(weights.token_embedding)
        if weights.positions is not None:
            decoder.position_embedding.weight.copy_(weights.positions)
        put(decoder.lm_head, weights.lm_head)
        for layer, new in zip(decoder.layers, weights.layers, strict=True):
            for part in ("query", "key", "value", "output"):
                put(getattr(layer.attention, part), getattr(new, part))
            for part in ("gate", "up", "down"):
                if getattr(new, part) is not None:
                    put(getattr(layer.feed_forward, part), getattr(new, part))
    return decoder.eval()


def test_the_rewritten_decoder_computes_the_same(family):
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 80)))
    with torch.no_grad():
        expected, measured = family.module(tokens), decoder_of(rewritten(family))(tokens)
    assert (measured - expected).abs().max() <= 5e-6 * expected.abs().max()


def test_every_norm_that_is_left_has_no_gain_and_no_bias(family):
    weights = rewritten(family)
    norms = [
        weights.final_norm,
        *(norm for layer in weights.layers for norm in (layer.attention_norm, layer.feed_forward_norm)),
    ]
    assert all(norm.bias is None and bool((norm.gain == 1).all()) for norm in norms)


def test_a_lone_large_component_of_the_residual_stream_is_spread(llama):
    weights = decoder_weights(llama.module)
    spiked = weights.token_embedding.clone()
    spiked[:, 5] += 20.0
    before = prominence(spiked)
    text = tokens_of(CALIBRATION, llama.tokenizer.json)
    after = prepare_for_rounding(replace(weights, token_embedding=spiked), measure_sizes(llama.module, text))
    assert before.median() > 5.0
    assert prominence(after.token_embedding).median() < 3.5


def prominence(rows: Tensor) -> Tensor:
    return rows.abs().amax(dim=1) / rows.square().mean(dim=1).sqrt()


def test_a_rotation_is_orthogonal_and_the_same_for_the_same_seed():
    rotation = random_rotation(48, 3)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(48), atol=1e-6, rtol=0)
    assert torch.equal(rotation, random_rotation(48, 3))
    assert not torch.equal(rotation, random_rotation(48, 4))


def test_components_that_are_never_active_are_left_finite(llama):
    weights = decoder_weights(llama.module)
    sizes = measure_sizes(llama.module, tokens_of(CALIBRATION, llama.tokenizer.json))
    silent = tuple(
        replace(size, hidden=torch.zeros_like(size.hidden), context=size.context * (torch.arange(64) % 3 > 0))
        for size in sizes
    )
    for layer in prepare_for_rounding(weights, silent).layers:
        assert all(bool(each.weight.isfinite().all()) for each in (layer.value, layer.output, layer.up, layer.down))


def test_measuring_leaves_no_hook_behind(llama):
    measure_sizes(llama.module, tokens_of(CALIBRATION, llama.tokenizer.json))
    assert all(not module._forward_pre_hooks for module in llama.module.modules())
