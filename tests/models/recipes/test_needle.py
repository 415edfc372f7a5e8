"""The recipe `needle`: what it hides, and that only attention which reaches the needle can find it."""

from pathlib import Path
from tomllib import loads

import pytest
import torch

from models import checkpoint
from models.config import ConfigError, from_table
from models.recipes import needle, run

RECIPE = needle.__file__.removesuffix(".py")


def config_of(variant=""):
    return from_table(needle.NeedleConfig, loads(Path(f"{RECIPE}{variant}.toml").read_text()))


@pytest.mark.parametrize("variant", ["", "_window", "_mean"])
def test_each_text_hides_one_needle_beyond_the_reach_of_the_windows(variant):
    torch.manual_seed(0)
    config = config_of(variant)
    texts = needle.hide(500, config.num_tokens, config.encoder)
    assert (texts.token_ids[:, 0] == needle.QUERY).all()
    assert (texts.token_ids[:, 1:] != needle.QUERY).all()
    hidden = (texts.token_ids >= 1) & (texts.token_ids < needle.FIRST_NOISE)
    assert (hidden.sum(1) == 1).all()
    places = hidden.int().argmax(1)
    assert (places > needle.reach(config.encoder)).all()
    assert (places < texts.lengths).all()
    assert torch.equal(texts.token_ids[hidden], 1 + texts.needles)
    assert config.num_tokens / 2 <= int(texts.lengths.min()) < 140
    assert 240 < int(texts.lengths.max()) <= config.num_tokens
    assert set(texts.needles.tolist()) == set(range(needle.NUM_NEEDLES))


def test_the_ablation_has_the_same_windows_and_nothing_else_differs():
    longformer, window = config_of(), config_of("_window")
    assert needle.reach(longformer.encoder) == needle.reach(window.encoder) == 16
    assert (longformer.run, longformer.optimiser, longformer.num_tokens) == (
        window.run,
        window.optimiser,
        window.num_tokens,
    )


def test_windows_alone_carry_nothing_from_the_needle_to_the_query_and_a_global_token_does():
    torch.manual_seed(0)
    for variant, carries in (("", True), ("_window", False)):
        config = config_of(variant)
        encoder = needle.Encoder(config.encoder).eval()
        texts = needle.hide(4, config.num_tokens, config.encoder)
        other = texts.token_ids.clone()
        hidden = (other >= 1) & (other < needle.FIRST_NOISE)
        other[hidden] = 1 + (texts.needles + 1) % needle.NUM_NEEDLES
        with torch.no_grad():
            before = needle.logits(encoder, texts.token_ids, texts.lengths)
            after = needle.logits(encoder, other, texts.lengths)
        assert torch.equal(before, after) is not carries


def test_figures_are_the_same_at_every_call_and_leave_the_generator_alone():
    torch.manual_seed(0)
    config = config_of()
    encoder = needle.Encoder(config.encoder).eval()
    state = torch.get_rng_state()
    assert needle.figures(encoder, 64) == needle.figures(encoder, 64)
    assert torch.equal(torch.get_rng_state(), state)


def test_texts_must_be_longer_than_the_windows_reach(tmp_path):
    text = Path(f"{RECIPE}.toml").read_text()
    for old, new, message in (
        ("num_tokens = 256", "num_tokens = 30", r"num_tokens is 30; it must lie in 36\.\.1024"),
        ("num_tokens = 256", "num_tokens = 2000", r"num_tokens is 2000; it must lie in 36\.\.1024"),
        ("vocab_size = 81", "vocab_size = 17", r"vocab_size is 17; it must be above 17"),
    ):
        path = tmp_path / "needle.toml"
        path.write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match=message):
            run.train("needle", directory=tmp_path / "run", config_file=path)


@pytest.mark.slow
def test_longformer_finds_every_needle_and_windows_alone_none(tmp_path):
    found = run.train("needle", directory=tmp_path / "longformer")
    assert found["accuracy"] == 1.0
    trained = checkpoint.load(tmp_path / "longformer" / "checkpoint")
    assert run.evaluate(tmp_path / "longformer" / "checkpoint")["accuracy"] >= 0.95  # of four times the length
    assert trained.recipe == "needle"
    missed = run.train("needle-window", directory=tmp_path / "window")
    assert missed["accuracy"] < 0.12  # chance is 1/16
