"""Properties of rotary, sinusoidal and learned positions."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from models.attention.positions import (
    LearnedPositions,
    Rotary,
    SinusoidalPositions,
    alibi_bias,
    alibi_slopes,
    sinusoid,
)

BOTH_LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@BOTH_LAYOUTS
def test_scores_depend_on_distance_only(interleaved):
    rotary = Rotary(16, interleaved=interleaved)
    query, key = torch.randn(2, 1, 1, 9, 16, dtype=torch.float64)
    positions = torch.arange(9)[None]
    scores = rotary(query, positions) @ rotary(key, positions).mT
    shifted = rotary(query, positions + 1000) @ rotary(key, positions + 1000).mT
    torch.testing.assert_close(scores, shifted, rtol=0, atol=1e-5)  # cosines are float32
    assert not torch.allclose(scores, rotary(query, positions + 1) @ rotary(key, positions).mT, atol=1e-2)


@BOTH_LAYOUTS
def test_position_zero_is_the_identity_and_norms_are_kept(interleaved):
    rotary, x = Rotary(16, interleaved=interleaved), torch.randn(2, 3, 9, 16)
    assert torch.equal(rotary(x, torch.zeros(1, 9, dtype=torch.int64)), x)
    torch.testing.assert_close(rotary(x, torch.arange(9)[None] * 77).norm(dim=-1), x.norm(dim=-1))


@BOTH_LAYOUTS
def test_each_pair_turns_by_its_own_angle(interleaved):
    rotary = Rotary(6, theta=100.0, interleaved=interleaved)
    x = torch.randn(6)
    rotated = rotary(x.reshape(1, 1, 1, 6), torch.tensor([[3]])).flatten()
    for pair in range(3):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 3)
        angle = 3 * 100.0 ** (-2 * pair / 6)
        expected = complex(x[first], x[second]) * complex(math.cos(angle), math.sin(angle))
        assert complex(rotated[first], rotated[second]) == pytest.approx(expected, abs=1e-6)


def test_the_two_layouts_are_equal_up_to_a_permutation():
    x, positions = torch.randn(2, 3, 9, 16), torch.arange(9)[None]
    order = torch.arange(16).reshape(8, 2).T.flatten()  # even components, then odd ones
    half_split = Rotary(16)(x[..., order], positions)
    torch.testing.assert_close(half_split, Rotary(16, interleaved=True)(x, positions)[..., order])
    assert not torch.allclose(Rotary(16)(x, positions), Rotary(16, interleaved=True)(x, positions))


def test_half_split_equals_transformers():
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    x, positions = torch.randn(2, 4, 50, 16), torch.arange(50)[None]
    cos, sin = LlamaRotaryEmbedding(config)(x, positions)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(Rotary(16, theta=5e5)(x, positions), expected, rtol=0, atol=2e-5)


@BOTH_LAYOUTS
def test_a_partial_rotation_leaves_the_tail_untouched(interleaved):
    x, positions = torch.randn(1, 2, 5, 16), torch.arange(5)[None] + 3
    partial = Rotary(16, rotary_dim=6, interleaved=interleaved)(x, positions)
    assert torch.equal(partial[..., 6:], x[..., 6:])
    torch.testing.assert_close(partial[..., :6], Rotary(6, interleaved=interleaved)(x[..., :6], positions))


def test_rows_turn_at_their_own_positions():
    rotary, x = Rotary(8), torch.randn(2, 1, 3, 8)
    together = rotary(x, torch.tensor([[0, 1, 2], [40, 41, 42]]))
    torch.testing.assert_close(together[1:], rotary(x[1:], torch.tensor([[40, 41, 42]])))


def test_half_precision_inputs_use_float32_angles():
    x, positions = torch.randn(1, 1, 4, 64), torch.tensor([[0, 1000, 4001, 8191]])
    rotated = Rotary(64)(x.half(), positions)
    assert rotated.dtype == torch.float16
    torch.testing.assert_close(rotated.float(), Rotary(64)(x, positions), rtol=0, atol=5e-3)


def test_a_width_that_cannot_be_paired_is_refused():
    for rotary_dim in (5, 0, 18):
        with pytest.raises(ValueError, match=f"rotary_dim {rotary_dim} must be even, positive and at most head_dim 16"):
            Rotary(16, rotary_dim=rotary_dim)


@pytest.mark.parametrize("d_model", [8, 7, 1])
def test_sinusoids_alternate_sine_and_cosine(d_model):
    encoding = sinusoid(torch.arange(50), d_model)
    assert encoding.shape == (50, d_model)
    for component in range(d_model):
        angle = torch.arange(50) / 10000 ** (component // 2 * 2 / d_model)
        torch.testing.assert_close(encoding[:, component], angle.cos() if component % 2 else angle.sin())
    module = SinusoidalPositions(d_model)
    assert torch.equal(module(torch.tensor([[3, 49]]))[0], encoding[[3, 49]])
    assert not list(module.parameters())


def test_learned_positions_end_where_their_table_does():
    positions = LearnedPositions(5, 3)
    torch.nn.init.normal_(positions.weight)
    assert torch.equal(positions(torch.tensor([[4, 0]]))[0], positions.weight[[4, 0]])
    with pytest.raises(IndexError):
        positions(torch.tensor([[5]]))


@pytest.mark.parametrize(
    ("num_heads", "slopes"),
    [
        (1, [1 / 256]),
        (8, [2.0**-exponent for exponent in range(1, 9)]),
        (6, [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]),
        (12, [2.0**-exponent for exponent in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]),
    ],
)
def test_alibi_has_a_slope_for_each_head_of_any_number(num_heads, slopes):
    torch.testing.assert_close(alibi_slopes(num_heads), torch.tensor(slopes))


def test_alibi_costs_what_the_distance_of_absolute_positions_says():
    slopes = alibi_slopes(6)
    queries, keys = torch.tensor([[5, 6, 7], [0, 1, 2]]), torch.arange(10)[None]
    bias = alibi_bias(slopes, queries, keys)
    assert bias.shape == (2, 6, 3, 10)
    for row, head, query, key in ((0, 2, 0, 5), (0, 2, 1, 0), (1, 5, 2, 9), (1, 0, 0, 0)):
        distance = abs(int(queries[row, query]) - key)
        assert bias[row, head, query, key].item() == pytest.approx(-slopes[head].item() * distance)
    torch.testing.assert_close(alibi_bias(slopes, queries + 1000, keys + 1000), bias)
    square = alibi_bias(slopes, keys, keys)
    assert (square.diagonal(dim1=-2, dim2=-1) == 0).all()
    assert torch.equal(square, square.mT)
