"""The recipe `sequences`: what is asked, how it is judged, and that attention learns where to look."""

from dataclasses import replace
from pathlib import Path
from tomllib import loads

import pytest
import torch

from models import checkpoint
from models.config import from_table
from models.recipes import run, sequences

ORDERS = ("copy", "reverse", "sort")


def config_of(order):
    path = Path(sequences.__file__).with_name(f"sequences_{order}.toml")
    return from_table(sequences.SequencesConfig, loads(path.read_text()))


def short(order, steps, **model):
    config = config_of(order)
    return replace(
        config,
        max_length=4,
        max_longer_length=6,
        run=replace(config.run, steps=steps, batch_size=32, evaluate_every=1000),
        model=replace(config.model, d_model=32, num_layers=1, d_ff=32, **model),
    )


@pytest.mark.parametrize("order", ORDERS)
def test_places_say_where_every_letter_of_the_target_stands(order):
    for pair in sequences.draw(order, 50, (1, 12), torch.Generator().manual_seed(0)):
        assert len(pair.target) == len(pair.source)
        assert sorted(pair.target) == sorted(pair.source)
        places = sequences.places(order, pair.source)
        assert places.any(1).all()
        for letter, row in zip(pair.target, places, strict=True):
            assert [pair.source[index] for index in row.nonzero().flatten().tolist()] == [letter]
        assert (places.sum(0) == 1).all()
        assert order != "sort" or len(set(pair.source)) == len(pair.source)
    source = (5, 3, 9, 4)
    expected = {"copy": source, "reverse": (4, 9, 3, 5), "sort": (3, 4, 5, 9)}
    assert sequences.rearranged(order, source) == expected[order]


def test_lengths_are_drawn_evenly_and_letters_too():
    pairs = sequences.draw("copy", 6000, (3, 5), torch.Generator().manual_seed(0))
    for size in (3, 4, 5):
        assert abs(sum(len(pair.source) == size for pair in pairs) - 2000) < 200
    letters = torch.tensor([letter for pair in pairs for letter in pair.source])
    assert (letters.min(), letters.max()) == (3, sequences.VOCAB_SIZE - 1)
    assert torch.bincount(letters)[3:].min() > 0.8 * len(letters) / 26


@pytest.mark.parametrize(
    "choices",
    [
        {"positions": "rotary"},
        {"positions": "alibi"},
        {"positions": "learned"},
        {"window": 3},
        {"attention": "favor", "num_features": 16},
        {"attention": "elu", "positions": "rotary"},
        {"attention": "mean"},
    ],
    ids=str,
)
def test_every_kind_of_attention_and_positions_can_be_trained_and_judged(choices, tmp_path):
    figures = sequences.run(short("reverse", 2, **choices), tmp_path)
    assert figures.keys() == {"validation_loss", "exact", "longer_exact", "aligned"}
    model = checkpoint.load(tmp_path / "checkpoint")
    assert model.recipe == "sequences-reverse"
    assert sequences.judge(model.module, "reverse", 4) == pytest.approx(figures)


def test_a_few_steps_already_point_attention_at_the_right_letters(tmp_path):
    for name in ("softmax", "mean"):
        (tmp_path / name).mkdir()
    figures = sequences.run(short("reverse", 150), tmp_path / "softmax")
    blind = sequences.run(short("reverse", 150, attention="mean"), tmp_path / "mean")
    assert figures["aligned"] > 0.4
    assert blind["aligned"] < 0.2


@pytest.mark.slow
def test_the_recipe_reaches_its_figures_and_without_attention_it_collapses(tmp_path):
    figures = run.train("sequences-reverse", directory=tmp_path / "attention")
    assert figures["exact"] >= 0.99
    assert figures["aligned"] >= 0.95
    blind = config_of("reverse")
    blind = replace(blind, model=replace(blind.model, attention="mean"))
    (tmp_path / "blind").mkdir()
    assert sequences.run(blind, tmp_path / "blind")["exact"] < 0.5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('order = "copy"', 'order = "shuffle"', "order is 'shuffle'; it must be one of copy, reverse, sort"),
        ("max_longer_length = 24", "max_longer_length = 12", "max_longer_length is 12; max_length is 12 already"),
        ('"sinusoidal"', '"relative"', "positions is 'relative'; it must be one of"),
        ("num_heads = 4", "num_heads = 5", "d_model is 64; it must be a multiple of num_heads, 5"),
    ],
)
def test_a_wrong_configuration_names_field_value_and_limit(old, new, message, tmp_path):
    text = Path(sequences.__file__).with_name("sequences_copy.toml").read_text()
    assert old in text
    path = tmp_path / "wrong.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        run.train("sequences-copy", directory=tmp_path / "run", config_file=path)


def test_no_more_letters_can_be_sorted_than_there_are():
    with pytest.raises(ValueError, match="max_longer_length is 27; only 26 letters differ"):
        replace(config_of("sort"), max_longer_length=27)
