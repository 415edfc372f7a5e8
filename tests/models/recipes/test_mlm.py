"""The recipe `mlm`, tiny: it learns from both sides, is comparable with a decoder, and its checkpoint is whole."""

import json
from pathlib import Path
from tomllib import loads

import pytest
import torch
from tokenizers import Tokenizer

from models import checkpoint
from models.config import ConfigError, from_table
from models.decoder import Decoder
from models.masked_lm import MaskedLanguageModel
from models.recipes import mlm, run

CONFIG = """
evaluation_windows = 12
objective = "{objective}"

[run]
seed = 3
steps = {steps}
batch_size = 64
evaluate_every = 1000

[optimiser]
learning_rate = 1e-2
final_learning_rate = 1e-3
warmup_steps = 10
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
clip_norm = 1

[text]
file = "{text}"
validation_documents = 8
source = "letters and their neighbours"
licence = "CC0-1.0"

[encoder]
vocab_size = 258
max_source_len = 16
positions = "none"

[encoder.stack]
d_model = 32
num_layers = 1
num_heads = 4
d_ff = 32
positions = "rotary"
attention = "{attention}"
"""


@pytest.fixture
def train(tmp_path):
    """Train on text in which most letters are known from their neighbours, and one in three only half."""
    documents = [
        "".join(pair for index in range(40) for pair in (("ab", "ac")[(index * seed) % 7 < 3], "d"))
        for seed in range(40)
    ]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(documents) + "\n")

    def run_recipe(name, **changes):
        choices = {"objective": "masked", "attention": "softmax", "steps": 150} | changes
        path = tmp_path / f"{name}.toml"
        path.write_text(CONFIG.format(text=text, **choices))
        return run.train("mlm", directory=tmp_path / name, config_file=path)

    return run_recipe


def test_it_learns_and_its_checkpoint_can_be_used(train, tmp_path):
    figures = train("run")
    baseline = json.loads((tmp_path / "run" / "baseline.json").read_text())
    assert figures["masked_accuracy"] > max(0.7, baseline["two_sided_accuracy"] - 0.05)
    model = checkpoint.load(tmp_path / "run" / "checkpoint")
    assert isinstance(model.module, MaskedLanguageModel)
    assert (model.recipe, model.data) == ("mlm", "letters and their neighbours")
    tokenizer = Tokenizer.from_str(model.tokenizer.json)
    text = f"abdacdab{mlm.MASK}acdab"
    token_ids = torch.tensor([tokenizer.encode(text).ids])
    place = token_ids[0].tolist().index(tokenizer.token_to_id(mlm.MASK))
    assert tokenizer.id_to_token(int(model.module(token_ids)[0, place].argmax())) == "d"


def test_a_decoder_of_the_same_size_is_judged_at_the_same_places(train, tmp_path):
    figures = train("causal", objective="causal", steps=2)
    assert figures.keys() == train("masked", steps=2).keys() == {"validation_loss", "masked_accuracy"}
    decoder = checkpoint.load(tmp_path / "causal" / "checkpoint").module
    encoder = checkpoint.load(tmp_path / "masked" / "checkpoint").module
    assert isinstance(decoder, Decoder)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (decoder, encoder.encoder)]
    assert sizes[0] == sizes[1]


def test_mean_pooling_can_take_the_place_of_attention(train):
    assert 0.0 <= train("mean", attention="mean", steps=2)["masked_accuracy"] <= 1.0


def test_what_is_asked_are_ordinary_tokens_that_a_decoder_could_tell(train, tmp_path):
    train("run", steps=1)
    config = from_table(mlm.MlmConfig, loads((tmp_path / "run.toml").read_text()))
    tokenizer = Tokenizer.from_file(str(tmp_path / "run" / "tokenizer.json"))
    held_out = config.text.validation_documents
    places = mlm._places(config, tokenizer, ["abd" * 20] * held_out)
    assert places.windows.shape == (12, 16)
    assert places.selected.any()
    assert not places.selected[:, 0].any()
    end = tokenizer.token_to_id(mlm.END_OF_TEXT)
    assert (places.windows == end).any()
    assert not places.selected[places.windows == end].any()
    assert (places.hidden[places.selected] == tokenizer.token_to_id(mlm.MASK)).all()
    assert torch.equal(places.hidden[~places.selected], places.windows[~places.selected])
    with pytest.raises(ConfigError, match="evaluation_windows is 12; the text has 3"):
        mlm._places(config, tokenizer, ["abd" * 2] * held_out)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('objective = "masked"', 'objective = "both"', "objective is 'both'; it must be one of masked, causal"),
        ("evaluation_windows = 512", "evaluation_windows = 0", "evaluation_windows is 0; it must be an integer of at"),
        ("evaluation_windows = 512", "evaluation_windows = 512\ndropout = 1.0", r"dropout is 1\.0; it must lie in"),
        ("validation_documents = 8", "validation_documents = 300", "is 300; the text has 221 documents"),
    ],
)
def test_a_wrong_configuration_names_field_value_and_limit(old, new, message, tmp_path):
    text = Path(mlm.__file__).with_suffix(".toml").read_text()
    assert old in text
    path = tmp_path / "wrong.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        run.train("mlm", directory=tmp_path / "run", config_file=path)


@pytest.mark.slow
def test_the_committed_checkpoint_is_right_more_often_than_counting():
    figures = run.evaluate(Path(mlm.__file__).parents[1] / "checkpoints" / "mlm")
    assert figures["masked_accuracy"] == pytest.approx(0.663, abs=0.002)
    assert figures["masked_accuracy"] > 0.596 + 0.05  # what stands most often between the same two neighbours
