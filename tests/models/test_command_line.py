"""`python -m models`: what it prints, and how it fails."""

import numpy
import pytest
import torch
from PIL import Image

from models import checkpoint
from models.__main__ import main
from models.examples import picture
from models.readers.packaged import SMOLLM2


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("imported") / "smollm2"
    assert main(["import", "gguf", str(SMOLLM2.path()), str(directory)]) == 0
    return directory


def test_an_imported_checkpoint_holds_the_model(imported, smollm2_135m):
    model = checkpoint.load(imported)
    assert model.module.config == smollm2_135m.module.config
    assert (model.tokenizer, model.licence) == (smollm2_135m.tokenizer, "apache-2.0")


def test_show_prints_size_and_states(imported, capsys):
    assert main(["show", str(imported)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["parameters", "134,515,008"] in lines
    assert ["num_kv_heads", "3"] in lines
    assert ["state", "0.key", "append", "torch.float32", "[3,", "'capacity',", "64]"] in lines
    assert ["states", "46,080", "bytes", "for", "each", "token"] in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "absent"], "absent is not a whole checkpoint: config.json is missing"),
        (["import", "gguf", "absent.gguf", "out"], "absent.gguf is no readable GGUF file"),
        (["import", "huggingface", "absent", "out"], "config.json is missing"),
        (["train", "lm", "--config", "absent.toml"], "absent.toml"),
        (["train", "lm", "--resume", "--out", "absent"], "absent holds no run to resume"),
    ],
)
def test_an_expected_failure_is_one_line_and_status_1(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_recipe_is_a_usage_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "poems"])
    assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "size"), [("digit", (8, 8)), ("scene", (16, 16)), ("clutter", (24, 24))])
def test_a_test_picture_is_written_as_the_models_see_it(tmp_path, capsys, kind, size):
    file = tmp_path / "picture.png"
    assert main(["picture", kind, "3", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    with Image.open(file) as image:
        pixels = torch.from_numpy(numpy.asarray(image).copy())
    assert ((pixels / 255 - picture(3, *size)[0, 0]).abs() < 0.5 / 255 + 1e-6).all()
    assert main(["picture", kind, "5000", str(file)]) == 1
    assert "no test picture 5000" in capsys.readouterr().err
