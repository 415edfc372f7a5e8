"""Scores: their formulas, parity with Keras, and the identities between them."""

import math

import pytest
import torch
from torch import nn

from models.attention.memory import MemoryAttention
from models.attention.scores import SCORES, Additive, Constant, Dot, General, ScaledDot, score_named


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    """Keras on torch; it reads its backend from the environment and writes its settings to a home of its own."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("KERAS_BACKEND", "torch")
        environment.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        import keras

        yield keras


def inputs(d_query=6, d_memory=8):
    return torch.randn(3, 4, d_query, dtype=torch.float64), torch.randn(3, 5, d_memory, dtype=torch.float64)


def scores_of(score, query, memory):
    return score(query, score.project(memory))


def test_each_score_is_its_formula_for_every_pair_of_query_and_place():
    query, memory = inputs(8, 8)
    additive, general = Additive(8, 8, 5, bias=True).double(), General(8, 8).double()
    formulas = [
        (Dot(8, 8), lambda q, k: q @ k),
        (ScaledDot(8, 8), lambda q, k: q @ k / math.sqrt(8)),
        (general, lambda q, k: q @ general.query.weight.T @ k),
        (
            additive,
            lambda q, k: (
                additive.weight @ torch.tanh(additive.query.weight @ q + additive.query.bias + additive.key.weight @ k)
            ),
        ),
        (Constant(8, 8), lambda q, k: torch.zeros((), dtype=torch.float64)),
    ]
    for score, formula in formulas:
        expected = torch.stack(
            [
                torch.stack([torch.stack([formula(q, k) for k in memory[row]]) for q in query[row]])
                for row in range(len(query))
            ]
        )
        torch.testing.assert_close(scores_of(score, query, memory), expected, rtol=0, atol=1e-10)


def test_concat_is_additive_with_its_matrix_split():
    query, memory = inputs()
    score = score_named("concat", 6, 8, 5).double()
    joined = torch.cat((score.query.weight, score.key.weight), 1)  # W_a = [W U]
    pairs = torch.cat((query[:, :, None].expand(-1, -1, 5, -1), memory[:, None].expand(-1, 4, -1, -1)), -1)
    expected = torch.tanh(pairs @ joined.T) @ score.weight
    torch.testing.assert_close(scores_of(score, query, memory), expected, rtol=0, atol=1e-10)
    assert SCORES["concat"] is SCORES["additive"]


def test_a_bias_on_the_query_side_is_the_perceptron_of_opennmt():
    """That has a bias in the query's projection, none in the memory's, and none in the output."""
    query, memory = inputs(6, 6)
    score = Additive(6, 6, 6, bias=True).double()
    linear_query, linear_context, v = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        for ours, theirs in ((score.query, linear_query.double()), (score.key, linear_context.double())):
            ours.load_state_dict(theirs.state_dict())
        score.weight.copy_(v.double().weight[0])
    wide_query = linear_query(query).view(3, 4, 1, 6).expand(3, 4, 5, 6)
    wide_memory = linear_context(memory).view(3, 1, 5, 6).expand(3, 4, 5, 6)
    expected = v(torch.tanh(wide_query + wide_memory).view(-1, 6)).view(3, 4, 5)
    torch.testing.assert_close(scores_of(score, query, memory), expected, rtol=0, atol=1e-10)


def test_without_projections_it_is_the_additive_attention_of_keras(keras):
    """Theirs has none, so ours get identities; and ours hides what is masked where theirs subtracts a large number."""
    query, memory = (tensor.float() for tensor in inputs(8, 8))
    valid = torch.tensor([[True] * 5, [True, True, True, False, False], [True] + [False] * 4])
    score = Additive(8, 8, 8)
    with torch.no_grad():
        score.query.weight.copy_(torch.eye(8))
        score.key.weight.copy_(torch.eye(8))
    theirs = keras.layers.AdditiveAttention(use_scale=True)
    theirs.build([(3, 4, 8), (3, 5, 8)])
    theirs.scale.assign(score.weight.detach())
    expected, expected_weights = theirs([query, memory], mask=[None, valid], return_attention_scores=True)
    attention = MemoryAttention(score)
    recalled = attention(query, attention.project(memory, valid), valid, need_weights=True)
    torch.testing.assert_close(recalled.weights, expected_weights.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(recalled.context, expected.detach(), rtol=0, atol=1e-5)


def test_dot_scores_are_those_of_keras(keras):
    query, memory = (tensor.float() for tensor in inputs(8, 8))
    valid = torch.tensor([[True] * 5, [True, True, True, False, False], [True] + [False] * 4])
    expected = keras.layers.Attention()([query, memory], mask=[None, valid])  # unscaled, unless told otherwise
    attention = MemoryAttention(Dot(8, 8))
    torch.testing.assert_close(attention(query, {"memory": memory}, valid).context, expected, rtol=0, atol=1e-5)


def test_general_with_an_identity_is_dot():
    query, memory = inputs(8, 8)
    general = General(8, 8).double()
    with torch.no_grad():
        general.query.weight.copy_(torch.eye(8))
    torch.testing.assert_close(scores_of(general, query, memory), scores_of(Dot(8, 8), query, memory))


def test_scaled_scores_of_normal_vectors_have_unit_variance_whatever_their_width():
    for width in (16, 256):
        query, memory = torch.randn(1, 400, width), torch.randn(1, 400, width)
        assert scores_of(ScaledDot(width, width), query, memory).var().item() == pytest.approx(1.0, abs=0.1)
    learned = ScaledDot(16, 16, learned=True)
    assert [name for name, _ in learned.named_parameters()] == ["scale"]
    assert learned.scale.item() == pytest.approx(0.25)
    assert not list(ScaledDot(16, 16).parameters())


def test_weight_norm_leaves_the_direction_to_the_vector_and_the_length_to_the_gain():
    query, memory = inputs()
    score = Additive(6, 8, 5, weight_norm=True).double()
    before = scores_of(score, query, memory)
    with torch.no_grad():
        score.weight.mul_(7.0)
    torch.testing.assert_close(scores_of(score, query, memory), before)
    with torch.no_grad():
        score.gain.mul_(3.0)
    torch.testing.assert_close(scores_of(score, query, memory), before * 3.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in SCORES if name != "mean"])
def test_half_precision_does_not_overflow(name, dtype):
    score = score_named(name, 64, 64, 32).to(dtype)
    query = torch.full((1, 2, 64), 40.0, dtype=dtype)
    scores = scores_of(score, query, query)
    assert scores.isfinite().all()
    if name == "dot":
        assert scores[0, 0, 0].item() == pytest.approx(40.0 * 40.0 * 64)


@pytest.mark.parametrize("name", SCORES)
def test_layout_makes_no_difference_and_inputs_stay_as_they_were(name):
    query, memory = inputs(8, 8)
    score = score_named(name, 8, 8, 5).double()
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (query, memory)]
    copies = [tensor.clone() for tensor in strided]
    torch.testing.assert_close(scores_of(score, *strided), scores_of(score, query, memory))
    assert all(torch.equal(one, copy) for one, copy in zip(strided, copies, strict=True))


def test_misuse_is_refused_with_advice():
    for kind in (Dot, ScaledDot):
        with pytest.raises(ValueError, match=r"query width 6 differs from memory width 8; .* take general"):
            kind(6, 8)
    with pytest.raises(
        ValueError, match="score is 'bilinear'; it must be one of additive, concat, dot, scaled, genera"
    ):
        score_named("bilinear", 6, 8, 5)
