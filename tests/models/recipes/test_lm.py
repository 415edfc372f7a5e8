"""The recipe `lm`, tiny: it learns, repeats under its seed, and continues as if never interrupted."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from models import checkpoint
from models.config import ConfigError
from models.generate import greedy
from models.recipes import lm, run
from models.training import loop
from models.training.metrics import MetricsLog

CONFIG = """
dropout = 0.1

[run]
seed = 3
steps = 60
batch_size = 8
evaluate_every = 20

[optimiser]
learning_rate = 1e-2
final_learning_rate = 1e-3
warmup_steps = 5
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
clip_norm = 1

[text]
file = "{text}"
validation_documents = 2
source = "sentences about cats"
licence = "CC0-1.0"

[decoder]
vocab_size = 280
d_model = 32
num_layers = 2
num_heads = 4
num_kv_heads = 2
head_dim = 8
d_ff = 48
max_model_len = 32
positions = "rotary"
norm = "rms"
norm_eps = 1e-5
activation = "swiglu"
bias = "none"
tie_embeddings = true
"""
WHEN = ["cat", "dog", "bird", "fish"]


@pytest.fixture
def config_file(tmp_path):
    sentences = [
        f"the {first} saw the {second} and the {second} saw the {third}. " * 3
        for first in WHEN
        for second in WHEN
        for third in WHEN
    ]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences) + "\n")
    path = tmp_path / "lm.toml"
    path.write_text(CONFIG.format(text=text))
    return path


def weights(directory):
    return load_file(directory / "checkpoint" / "model.safetensors")


def figures(directory):
    """All recorded figures but the only one that depends on the clock."""
    records = MetricsLog.read(directory / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name != "steps_per_second"} for record in records]


def test_it_learns_more_than_counting_and_its_checkpoint_can_be_used(config_file, tmp_path):
    config_file.write_text(config_file.read_text().replace("steps = 60", "steps = 180"))
    result = run.train("lm", directory=tmp_path / "run", config_file=config_file)
    baselines = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert result["validation_loss"] < baselines["bigram_loss"] < baselines["unigram_loss"]
    losses = [record["training_loss"] for record in figures(tmp_path / "run") if "training_loss" in record]
    assert losses[-1] < losses[0] / 2
    model = checkpoint.load(tmp_path / "run" / "checkpoint")
    assert (model.recipe, model.data, model.licence) == ("lm", "sentences about cats", "CC0-1.0")
    tokenizer = Tokenizer.from_str(model.tokenizer.json)
    prompt = tokenizer.encode("the cat saw the").ids
    assert tokenizer.decode(greedy(model.module, prompt, 2)).strip().split()[0] in WHEN


def test_the_same_seed_repeats_a_run_bit_for_bit_and_another_does_not(config_file, tmp_path):
    for name, seed in (("one", None), ("two", 3), ("three", 4)):
        run.train("lm", directory=tmp_path / name, config_file=config_file, seed=seed)
    one, two, three = (weights(tmp_path / name) for name in ("one", "two", "three"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["token_embedding.weight"], three["token_embedding.weight"])
    assert figures(tmp_path / "one") == figures(tmp_path / "two")


@pytest.mark.parametrize("stop_at", [25, 47])
def test_an_interrupted_run_continues_as_if_it_never_was(stop_at, config_file, tmp_path, monkeypatch):
    run.train("lm", directory=tmp_path / "whole", config_file=config_file)
    step, steps = loop._step, iter(range(1000))

    def interrupted(*arguments):
        if next(steps) == stop_at:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train("lm", directory=tmp_path / "parts", config_file=config_file)
    run.train("lm", directory=tmp_path / "parts", config_file=config_file, resume=True)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_resuming_a_finished_run_only_evaluates(config_file, tmp_path):
    result = run.train("lm", directory=tmp_path / "run", config_file=config_file)
    assert run.train("lm", directory=tmp_path / "run", config_file=config_file, resume=True) == result


def test_a_directory_is_neither_overwritten_nor_resumed_by_mistake(config_file, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        run.train("lm", directory=tmp_path / "run", config_file=config_file, resume=True)
    run._open(tmp_path / "run", {"recipe": "lm"}, resume=False)
    with pytest.raises(FileExistsError, match="is not empty; resume its run, or choose another directory"):
        run.train("lm", directory=tmp_path / "run", config_file=config_file)
    with pytest.raises(ConfigError, match="differs from that of the run"):
        run.train("lm", directory=tmp_path / "run", config_file=config_file, resume=True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 60", "stepz = 60", r"run\.stepz is unknown; known are seed, steps"),
        ("steps = 60", "", r"run\.steps is missing"),
        ("steps = 60", "steps = 0", r"run\.steps is 0; it must be at least 1"),
        ("steps = 60", "steps = 6.5", r"run\.steps is 6\.5; it must be of type int"),
        ("beta1 = 0.9", "beta1 = 1.0", r"optimiser\.beta1 is 1\.0; it must lie in \[0, 1\)"),
        ("num_kv_heads = 2", "num_kv_heads = 3", r"decoder\.num_heads is 4; it must be a multiple of num_kv_heads, 3"),
        ('norm = "rms"', 'norm = "none"', r"decoder\.norm is 'none'; it must be one of rms, layer"),
        ("dropout = 0.1", "dropout = 1.0", r"dropout is 1\.0"),
        ("[run]", "[run", "TOML|line"),
        ("vocab_size = 280", "vocab_size = 200", "vocab_size is 200; bytes and the end-of-text token alone are 257"),
        ("vocab_size = 280", "vocab_size = 9999", r"the text gives only \d+ tokens; vocab_size is 9999"),
        ("validation_documents = 2", "validation_documents = 64", "is 64; the text has 64 documents"),
        ("max_model_len = 32", "max_model_len = 99999", r"max_model_len is 99999; the training text has \d+ tokens"),
    ],
)
def test_a_wrong_configuration_names_field_value_and_limit(old, new, message, config_file, tmp_path):
    text = config_file.read_text()
    assert old in text
    config_file.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        run.train("lm", directory=tmp_path / "run", config_file=config_file)


def test_a_loss_that_is_not_finite_stops_the_run(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "_loss", lambda decoder, *_: decoder.lm_head.weight.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan after 1 steps; try a lower learning_rate"):
        run.train("lm", directory=tmp_path / "run", config_file=config_file)


def test_the_committed_recipe_and_its_text_fit_together():
    from pathlib import Path
    from tomllib import loads

    from models.config import from_table
    from models.training.text import read_documents

    config = from_table(lm.LmConfig, loads(Path(lm.__file__).with_suffix(".toml").read_text()))
    documents = read_documents(config.text.file)
    assert len(documents) == 221
    assert "Vice President Cheney" in documents[-config.text.validation_documents][:100]
    assert config.decoder.head_dim % 8 == 0  # what the served attention kernel needs
