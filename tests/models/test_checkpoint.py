"""Checkpoints come back as they were, appear whole, and say what is wrong with them."""

import json

import pytest
import torch

from models import checkpoint
from models.checkpoint import CheckpointError, TokenizerInfo, TrainedModel
from models.decoder import Decoder, DecoderConfig


def trained_model(*, tie_embeddings=True, seed=0):
    torch.manual_seed(seed)
    config = DecoderConfig(
        vocab_size=40,
        d_model=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        d_ff=24,
        max_model_len=32,
        positions="learned",
        norm="layer",
        norm_eps=1e-5,
        activation="gelu",
        bias="all",
        tie_embeddings=tie_embeddings,
    )
    return TrainedModel(
        module=Decoder(config).eval(),
        tokenizer=TokenizerInfo(
            json='{"naïve": true}',
            bos_token_id=3,
            eos_token_ids=(1, 2),
            pad_token_id=None,
            add_bos=True,
            chat_template="{{ x }}",
        ),
        source="a test",
        licence="Apache-2.0",
        recipe="none",
        data=None,
    )


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_what_is_saved_comes_back(tie_embeddings, tmp_path):
    model = trained_model(tie_embeddings=tie_embeddings)
    checkpoint.save(model, tmp_path / "deep" / "model")
    loaded = checkpoint.load(tmp_path / "deep" / "model")
    for field in ("tokenizer", "source", "licence", "recipe", "data"):
        assert getattr(loaded, field) == getattr(model, field)
    assert loaded.module.config == model.module.config
    assert not loaded.module.training
    ours, theirs = model.module.state_dict(), loaded.module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tied = loaded.module.lm_head.weight is loaded.module.token_embedding.weight
    assert tied is tie_embeddings


def test_saving_again_replaces_and_leaves_nothing_else(tmp_path):
    directory = tmp_path / "model"
    checkpoint.save(trained_model(seed=0), directory)
    newer = trained_model(seed=1)
    checkpoint.save(newer, directory)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = checkpoint.load(directory)
    assert torch.equal(loaded.module.lm_head.weight, newer.module.lm_head.weight)


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not a checkpoint"):
        checkpoint.save(trained_model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_save_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    directory = tmp_path / "model"
    checkpoint.save(trained_model(seed=0), directory)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(trained_model(seed=1), directory)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    checkpoint.load(directory)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(name, tmp_path):
    checkpoint.save(trained_model(), tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoint.load(tmp_path / "model")


def test_damage_is_reported_with_the_directory(tmp_path):
    directory = tmp_path / "model"

    def damage(name, change):
        checkpoint.save(trained_model(), directory)
        (directory / name).write_bytes(change((directory / name).read_bytes()))
        with pytest.raises(CheckpointError, match=str(directory)) as caught:
            checkpoint.load(directory)
        return str(caught.value)

    def edit(section, field, value):
        def change(data):
            document = json.loads(data)
            (document[section] if section else document)[field] = value
            return json.dumps(document).encode()

        return change

    damage("model.safetensors", lambda data: data[:100])
    damage("config.json", lambda data: data[:50])
    damage("tokenizer.json", lambda data: b"\xff" + data)
    assert "not of format" in damage("config.json", edit(None, "format", "other"))
    assert "d_ff is 0" in damage("config.json", edit("config", "d_ff", 0))
    assert "surprise" in damage("config.json", edit("config", "surprise", 1))
    assert "shape (40, 16)" in damage("config.json", edit("config", "vocab_size", 41))
    assert "missing tensors: layers.2." in damage("config.json", edit("config", "num_layers", 3))


def test_adding_a_bos_token_needs_one():
    with pytest.raises(ValueError, match="it needs a bos_token_id"):
        TokenizerInfo(
            json="{}", bos_token_id=None, eos_token_ids=(), pad_token_id=None, add_bos=True, chat_template=None
        )


def test_half_precision_takes_half_the_space_and_is_read_as_float32(tmp_path):
    model = trained_model()
    checkpoint.save(model, tmp_path / "whole")
    checkpoint.save(model, tmp_path / "half", half=True)
    whole, half = (tmp_path / name / "model.safetensors" for name in ("whole", "half"))
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    for name, tensor in checkpoint.load(tmp_path / "half").module.state_dict().items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, model.module.state_dict()[name].half().float())


def test_a_server_that_runs_as_somebody_else_can_read_it(tmp_path):
    checkpoint.save(trained_model(), tmp_path / "model")
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "model").iterdir())
