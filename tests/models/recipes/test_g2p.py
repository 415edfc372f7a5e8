"""The recipe `g2p`: its data, its error rates, a short run, and what the committed checkpoint achieves."""

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from models import checkpoint
from models.encoder_decoder import EncoderDecoder
from models.recipes import g2p, run
from models.training.edit_distance import edit_distance

CHECKPOINT = Path(g2p.__file__).parents[1] / "checkpoints" / "g2p"


def test_the_parts_share_no_headword_and_hold_the_whole_dictionary():
    parts = {name: g2p.read_words(name) for name in ("training", "validation", "test")}
    assert {name: len(words) for name, words in parts.items()} == {
        "training": 113_446,
        "validation": 6303,
        "test": 6303,
    }
    spellings = [word.spelling for words in parts.values() for word in words]
    assert len(set(spellings)) == len(spellings) == 126_052
    assert all(len(set(word.pronunciations)) == len(word.pronunciations) > 0 for word in parts["test"])


def test_the_split_is_that_of_the_seed_it_names():
    words = {word.spelling: part for part in ("training", "validation", "test") for word in g2p.read_words(part)}
    shuffled = sorted(words)
    random.Random(0).shuffle(shuffled)
    first, second = int(0.9 * len(shuffled)), int(0.95 * len(shuffled))
    assert {words[word] for word in shuffled[:first]} == {"training"}
    assert {words[word] for word in shuffled[first:second]} == {"validation"}
    assert {words[word] for word in shuffled[second:]} == {"test"}


@cache
def slow_distance(left: str, right: str) -> int:
    if not left or not right:
        return len(left) + len(right)
    if left[0] == right[0]:
        return slow_distance(left[1:], right[1:])
    return 1 + min(slow_distance(left[1:], right), slow_distance(left, right[1:]), slow_distance(left[1:], right[1:]))


@pytest.mark.parametrize("seed", range(20))
def test_the_edit_distance_is_the_least_number_of_edits(seed):
    numbers = random.Random(seed)
    left, right = ("".join(numbers.choices("abc", k=numbers.randrange(8))) for _ in range(2))
    assert edit_distance(left, right) == slow_distance(left, right) == edit_distance(right, left)


def small(config: g2p.G2pConfig) -> g2p.G2pConfig:
    model = config.model
    stack = replace(model.encoder.stack, d_model=32, num_layers=1, num_heads=2, d_ff=64)
    decoder = replace(model.decoder, d_model=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64)
    return replace(
        config,
        run=replace(config.run, steps=40, batch_size=32, evaluate_every=40, autocast=False),
        optimiser=replace(config.optimiser, warmup_steps=5),
        model=replace(model, encoder=replace(model.encoder, stack=stack), decoder=decoder),
    )


def test_a_short_run_learns_and_its_checkpoint_pronounces(tmp_path, monkeypatch):
    words = {part: g2p.read_words(part)[::40] for part in ("training", "validation")}
    monkeypatch.setattr(g2p, "_WORDS_WHILE_TRAINING", 16)
    monkeypatch.setattr(g2p, "read_words", words.__getitem__)
    figures = g2p.run(small(run.configuration("g2p")), tmp_path)
    assert figures["validation_loss"] < 3.4  # 42 phonemes by chance: 3.7
    trained = checkpoint.load(tmp_path / "checkpoint")
    (spoken,) = g2p.pronounce(trained, ["attendant"], 2)
    assert set(spoken) <= {sound for word in words["training"] for p in word.pronunciations for sound in p.split()}


@pytest.fixture(scope="module")
def trained():
    return checkpoint.load(CHECKPOINT)


def test_the_checkpoint_pronounces_words_it_has_never_seen(trained):
    assert isinstance(trained.module, EncoderDecoder)
    rates = g2p.error_rates(trained, g2p.read_words("test")[::40], 5)
    assert rates["word_error_rate"] <= 0.33  # 158 words: the figure and less than two standard errors
    assert rates["phoneme_error_rate"] <= 0.09


def test_spelling_in_capitals_is_the_same(trained):
    small_letters, capitals = g2p.pronounce(trained, ["transformer", "TRANSFORMER"], 1)
    assert small_letters == capitals


@pytest.mark.slow
def test_the_checkpoint_keeps_the_target_on_all_test_words():
    assert run.evaluate(CHECKPOINT)["word_error_rate"] <= 0.31
