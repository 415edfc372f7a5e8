"""The recipe `caption`: its grammar, its figures, its learning, and the captioner that it has trained."""

import itertools
from pathlib import Path
from tomllib import loads

import pytest
import torch
from tokenizers import Tokenizer

from models import checkpoint
from models.config import ConfigError, from_table
from models.recipes import caption, run
from models.training.digits import WORDS, Scenes, read_digits, scenes
from models.training.pairs import END, PAD, START

CHECKPOINTS = Path(run.__file__).parents[1] / "checkpoints"
COMMITTED = Path(caption.__file__).with_suffix(".toml")
LAYOUTS = [cells for cells in itertools.product((True, False), repeat=4) if any(cells)]


def understood(text):
    """Read a caption back: the digits in their order, and each one's offset (down, right) from the first."""
    first, *rest = text.split(" ", 1)
    digits, offsets = [WORDS.index(first)], [(0, 0)]
    for clause in rest[0].split(" and ") if rest else []:
        *relation, word = clause.split(" ")
        digits.append(WORDS.index(word))
        offsets.append(("above" in relation, ("left" in relation) - ("right" in relation)))
    return digits, offsets


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ((3, -1, -1, 7), "three above left of seven"),
        ((-1, -1, 8, -1), "eight"),
        ((-1, 5, 6, 0), "five above right of six and above zero"),
        ((1, 2, 3, 4), "one left of two and above three and above left of four"),
    ],
)
def test_a_caption_names_the_first_digit_and_how_it_lies_to_the_others(cells, expected):
    assert caption.describe(cells) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_caption_can_be_read_back(layout):
    cells = [place + 1 if filled else -1 for place, filled in enumerate(layout)]
    places = [place for place in range(4) if layout[place]]
    digits, offsets = understood(caption.describe(cells))
    assert digits == [place + 1 for place in places]
    assert offsets == [(place // 2 - places[0] // 2, place % 2 - places[0] % 2) for place in places]


def test_a_scene_without_digits_has_no_caption():
    with pytest.raises(ValueError, match="a caption needs a digit in one of them"):
        caption.describe((-1, -1, -1, -1))


def test_the_tokenizer_knows_every_word_and_no_caption_is_too_long():
    tokenizer = caption.caption_tokenizer()
    captions = [caption.describe([9 if filled else -1 for filled in layout]) for layout in LAYOUTS]
    lengths = [len(tokenizer.encode(text).ids) + 1 for text in captions]
    assert max(lengths) == caption.MAX_TOKENS
    for text in captions:
        assert PAD not in tokenizer.encode(text).ids
        assert " ".join(tokenizer.encode(text).tokens) == text
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "<s>", "</s>")] == [PAD, START, END]


def test_a_batch_predicts_each_word_from_those_before_it():
    tokenizer = caption.caption_tokenizer()
    drawn = Scenes(torch.zeros(2, 1, 16, 16), torch.tensor([[4, -1, -1, -1], [-1, 2, -1, 3]]))
    batch = caption.collate(drawn, tokenizer, 16)
    four, two, above, three = (tokenizer.token_to_id(word) for word in ("four", "two", "above", "three"))
    assert batch.inputs.tolist() == [[START, four, PAD, PAD], [START, two, above, three]]
    assert batch.labels.tolist() == [[four, END, PAD, PAD], [two, above, three, END]]
    assert batch.source_lengths.tolist() == [16, 16]


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_patches_are_counted_for_the_cell_that_they_lie_in(patch_size):
    cells = caption._cells_of_patches(patch_size)
    assert cells.sum(0).tolist() == [(8 / patch_size) ** 2] * 4
    assert cells[0].argmax() == 0
    assert cells[16 // patch_size - 1].argmax() == 1
    assert cells[-1].argmax() == 3


def test_it_learns_the_grammar_in_seconds_and_its_checkpoint_can_be_used(tmp_path):
    text = COMMITTED.read_text()
    for old, new in (
        ("d_model = 64", "d_model = 32"),
        ("head_dim = 16", "head_dim = 8"),
        ("num_layers = 2", "num_layers = 1"),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "caption.toml").write_text(_with(text, steps=100, batch_size=16, evaluate_every=100, warmup_steps=5))
    result = run.train("caption", directory=tmp_path / "run", config_file=tmp_path / "caption.toml")
    assert result["validation_loss"] < 1.3  # words at random cost ln 18 = 2.9
    trained = checkpoint.load(tmp_path / "run" / "checkpoint")
    written = caption.write(trained, scenes(read_digits("test"), 8).images, width=2)
    known = set(Tokenizer.from_str(trained.tokenizer.json).get_vocab())
    assert all(set(text.split()) <= known for text in written)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("height = 16", "height = 8", r"\(1, 8, 16\); scenes need \(1, 16, 16\)"),
        ("max_model_len = 16", "max_model_len = 12", "max_model_len is 12; it must be at least 13"),
        ("patch_size = ", "patch_size = 1 #", r"patch_size is 16; it must divide a cell's side, 8"),
        ("dropout = ", "dropout = 1.0 #", r"dropout is 1\.0"),
    ],
)
def test_a_wrong_configuration_names_field_value_and_limit(old, new, message):
    text = COMMITTED.read_text().replace("patch_size = 1 #", "patch_size = 16 #")
    assert old in text
    text = text.replace(old, new).replace("patch_size = 1 #", "patch_size = 16 #")
    with pytest.raises(ConfigError, match=message):
        from_table(caption.CaptionConfig, loads(text))


def test_a_vocabulary_of_another_size_is_refused(tmp_path):
    (tmp_path / "caption.toml").write_text(COMMITTED.read_text().replace("vocab_size = 18", "vocab_size = 20"))
    with pytest.raises(ConfigError, match="vocab_size is 20; captions need 18"):
        run.train("caption", directory=tmp_path / "run", config_file=tmp_path / "caption.toml")


def test_the_ablation_differs_from_the_recipe_in_its_attention_alone():
    plain, mean = (loads(COMMITTED.with_stem(stem).read_text()) for stem in ("caption", "caption_mean"))
    assert mean["model"]["encoder"]["stack"].pop("attention") == "mean"
    assert mean["model"]["decoder"].pop("attention") == "mean"
    assert plain == mean


def test_the_committed_captioner_reaches_its_figures():
    figures = run.evaluate(CHECKPOINTS / "caption")
    assert figures["exact"] >= 0.96
    assert figures["exact_of_four"] >= 0.95
    assert figures["cell_accuracy"] >= 0.99


def _with(text, **values):
    for name, value in values.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} = "))
        text = text.replace(line, f"{name} = {value}")
    return text
