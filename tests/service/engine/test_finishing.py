"""Probabilities and the largest of them, against PyTorch and by their properties."""

import numpy as np
import pytest
import torch

from service.engine.finishing import rank, sigmoid, softmax


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 8, (7, 20)).astype(np.float32)


def test_probabilities_are_those_of_pytorch(logits):
    theirs = torch.from_numpy(logits)
    assert np.allclose(softmax(logits), theirs.softmax(-1), atol=1e-7)
    assert np.allclose(sigmoid(logits), theirs.sigmoid(), atol=1e-7)


def test_no_logit_overflows():
    extreme = np.array([-1e38, 0, 1e38], np.float32)
    with np.errstate(over="raise", invalid="raise"):
        assert softmax(extreme).tolist() == [0, 0, 1]
        assert sigmoid(extreme).tolist() == [0, 0.5, 1]


def test_a_row_is_finished_as_if_it_were_alone(logits):
    together = rank(logits, 5)
    for row, each in enumerate(logits):
        alone = rank(each, 5)
        assert np.array_equal(alone.index, together.index[row])
        assert np.array_equal(alone.probability, together.probability[row])


def test_of_equals_the_first_comes_first():
    assert rank(np.array([1, 3, 3, 2], np.float32), 3).index.tolist() == [1, 2, 3]
    assert rank(np.array([5, 5], np.float32), 2, multi_label=True).index.tolist() == [0, 1]
