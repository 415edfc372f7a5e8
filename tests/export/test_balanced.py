"""Maps of constant scale: what factors, mixing and rotation leave as it was, and what they gain."""

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from export.calibration import measure_inputs
from export.encode_graph import rotate_values
from export.linear import BalancedLinear, quantise_weight
from export.text import CALIBRATION, windows_of
from export.weights import Affine


@pytest.fixture
def sample():
    """Rows of similar size, of which a few components are forty times as large as the others."""
    values = torch.randn(500, 48, generator=torch.Generator().manual_seed(0))
    values[:, ::17] *= 40
    return values


def some_map(num_inputs, num_outputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return Affine(
        weight=torch.randn(num_outputs, num_inputs, generator=generator),
        bias=torch.randn(num_outputs, generator=generator),
    )


def test_factors_and_mixing_are_undone_in_the_weights(sample):
    each = some_map(48, 20)
    module = BalancedLinear([each, some_map(48, 8, seed=2)], sample)
    stored = module.linear.maps[0]
    read = module.mixing(sample * module.factor)
    ours = linear(read, stored.codes.T * stored.scale[:, None], stored.bias)
    theirs = linear(sample, each.weight, each.bias)
    assert (ours - theirs).square().mean() < 1e-3 * theirs.square().mean()


def test_components_of_a_balanced_row_are_of_similar_size(sample):
    module = BalancedLinear([some_map(48, 20)], sample)
    spread = sample.std(dim=0).max() / sample.std(dim=0).min()
    balanced = module.mixing(sample * module.factor).std(dim=0)
    assert balanced.max() / balanced.min() < spread / 5
    assert float(module.linear.scale) * 127 < balanced.max() * 6


def test_a_component_that_is_never_active_has_a_finite_factor(sample):
    sample[:, 5] = 0
    assert bool(torch.isfinite(BalancedLinear([some_map(48, 20)], sample).factor).all())


def test_rotated_values_give_the_same_output_whatever_the_weights_of_attention():
    value, output = some_map(24, 32), some_map(32, 24, seed=2)
    rotated_value, rotated_output = rotate_values(value, output, num_heads=4)
    generator = torch.Generator().manual_seed(3)
    hidden, weights = torch.randn(6, 24, generator=generator), torch.rand(4, 6, 6, generator=generator)

    def attend(value, output):
        values = linear(hidden, value.weight, value.bias).unflatten(1, (4, 8)).transpose(0, 1)
        return linear((weights @ values).transpose(0, 1).flatten(1), output.weight, output.bias)

    torch.testing.assert_close(attend(rotated_value, rotated_output), attend(value, output), rtol=0, atol=1e-4)
    assert not torch.equal(quantise_weight(rotated_value.weight)[0], quantise_weight(value.weight)[0])


def test_inputs_of_every_layer_are_measured_on_texts_with_their_special_tokens(tiny_encoder):
    texts = windows_of(CALIBRATION, tiny_encoder.tokenizer.json, 50)
    encoder = tiny_encoder.module
    inputs = measure_inputs(encoder, texts)
    assert len(inputs) == len(encoder.stack.layers)
    num_tokens = sum(len(text) for text in texts)
    assert {tuple(each.shape) for each in (inputs[0].attention, inputs[0].feed_forward)} == {
        (num_tokens, encoder.config.stack.d_model)
    }
    assert max(len(text) for text in texts) <= 50
    assert all(np.isfinite(each.attention.numpy()).all() for each in inputs)
