"""The committed language models with softmax, window and Performer: what they reach, and that states change nothing."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import models
from models import checkpoint
from models.recipes import lm
from models.states import StateRule
from models.training.text import read_documents

CHECKPOINTS = Path(models.__file__).parent / "checkpoints"
LOSSES = {"lm": 3.530, "lm-window": 3.505, "lm-performer": 3.882}  # nats per token, of the whole validation text
BY_NAME = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture(scope="module")
def text():
    """The beginning of the first address that was held out."""
    return read_documents("state_of_the_union.txt.gz")[-8][:12000]


@BY_NAME
def test_it_predicts_a_part_of_the_validation_text_as_well_as_its_recipe_says(name, text):
    trained = checkpoint.load(CHECKPOINTS / name)
    validation = lm.Validation.of(Tokenizer.from_str(trained.tokenizer.json), [text])
    figures = lm.figures(trained.module, validation)
    assert figures["validation_loss"] == pytest.approx(LOSSES[name], abs=0.15)
    assert trained.recipe == "lm"


@BY_NAME
@pytest.mark.slow
def test_its_evaluation_gives_the_figure_of_its_recipe(name):
    figures = lm.evaluate(checkpoint.load(CHECKPOINTS / name))
    assert figures["validation_loss"] == pytest.approx(LOSSES[name], abs=0.002)


def test_window_and_performer_stay_near_softmax():
    characters_per_token = LOSSES["lm"] / 1.2782  # all three have the same tokens
    for name in ("lm-window", "lm-performer"):
        assert (LOSSES[name] - LOSSES["lm"]) / characters_per_token <= 0.15


@BY_NAME
@pytest.mark.parametrize("sizes", [[1] * 40, [33, 1, 6], [0, 17, 23]], ids=str)
@torch.no_grad()
def test_step_by_step_with_state_equals_one_pass(name, sizes, text):
    trained = checkpoint.load(CHECKPOINTS / name)
    token_ids = torch.tensor([Tokenizer.from_str(trained.tokenizer.json).encode(text).ids[: sum(sizes)]])
    state, parts = trained.module.initial_state(1, sum(sizes)), []
    for chunk in token_ids.split(sizes, 1):
        logits, state = trained.module(chunk, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), trained.module(token_ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "rule", "shape"),
    [
        ("lm", StateRule.APPEND, (2, "capacity", 16)),
        ("lm-window", StateRule.RING, (2, 32, 16)),
        ("lm-performer", StateRule.REPLACE, (2, 64, 17)),
    ],
)
def test_each_remembers_by_its_own_rule(name, rule, shape):
    specs = checkpoint.load(CHECKPOINTS / name).module.state_specs()
    assert {(spec.rule, spec.shape) for spec in specs} == {(rule, shape)}


def test_all_are_small():
    assert sum(path.stat().st_size for name in LOSSES for path in (CHECKPOINTS / name).iterdir()) < 3.4e6
