"""The recipe `digits` in all its kinds: its pictures are what they say, it learns, and a broken run continues alike."""

from pathlib import Path
from tomllib import loads

import pytest
import torch

from models import checkpoint
from models.config import ConfigError, from_table
from models.hard_vision import HardVision
from models.recipes import digits, run
from models.training import loop
from models.training.digits import FRAGMENT, cluttered, join_cells, read_digits, scenes
from models.vision import VisionTransformer, split_patches

CHECKPOINTS = Path(run.__file__).parents[1] / "checkpoints"
CONFIG = """
distortion = 0.3

[run]
seed = 1
steps = 60
batch_size = 32
evaluate_every = 20

[optimiser]
learning_rate = 5e-3
final_learning_rate = 0.0
warmup_steps = 5
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.98
clip_norm = 1.0

[model]
num_classes = 10

[model.encoder]
height = 8
width = 8
num_channels = 1
patch_size = 4

[model.encoder.stack]
d_model = 32
num_layers = 1
num_heads = 2
d_ff = 64
"""
CLUTTER = """
[clutter]
rows = 1
columns = 2
glance_size = 4
d_glance = 16
attention = "{attention}"
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "digits.toml"
    path.write_text(CONFIG)
    return path


def test_the_two_parts_are_all_digits_and_share_none():
    training, test = read_digits("training"), read_digits("test")
    assert (len(training.labels), len(test.labels)) == (1400, 397)
    assert training.images.shape == (1400, 1, 8, 8)
    assert (training.images.min(), training.images.max()) == (0, 1)
    rows = {tuple(image.flatten().tolist()) for part in (training, test) for image in part.images}
    assert len(rows) == 1797
    for part in (training, test):
        assert torch.bincount(part.labels).min() >= len(part.labels) * 0.09


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="part is 'validation'; it must be training or test"):
        read_digits("validation")


def test_distortion_moves_ink_and_none_at_strength_zero():
    original = read_digits("test")
    still, moved = original.distorted(0.0), original.distorted(1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(still.images, original.images, rtol=0, atol=1e-5)
    assert torch.equal(moved.labels, original.labels)
    change = (moved.images - original.images).abs().mean((1, 2, 3))
    assert change.min() > 0.01
    assert (moved.images.sum((1, 2, 3)) / original.images.sum((1, 2, 3))).mean() == pytest.approx(1.0, abs=0.05)


def test_a_cluttered_picture_has_one_whole_digit_where_it_says_and_fragments_elsewhere():
    source = read_digits("test")
    labels = {tuple(image.flatten().tolist()): label.item() for image, label in zip(*source, strict=True)}
    pictures = cluttered(source, 40, (2, 3), torch.Generator().manual_seed(0))
    cells = split_patches(pictures.images, 8, 8)
    assert torch.equal(join_cells(cells, (2, 3)), pictures.images)
    assert set(pictures.places.tolist()) == set(range(6))
    for row in range(40):
        for place in range(6):
            cell = cells[row, place, 0]
            if place == pictures.places[row]:
                assert labels[tuple(cell.flatten().tolist())] == pictures.labels[row]
            elif cell.any():
                inked = cell.nonzero()
                assert (inked.amax(0) - inked.amin(0)).max() < FRAGMENT
                patch = cell[inked[:, 0].amin() : inked[:, 0].amax() + 1, inked[:, 1].amin() : inked[:, 1].amax() + 1]
                assert any(_contains(image[0], patch) for image in source.images)


def test_a_scene_shows_the_digits_that_it_says():
    source = read_digits("test")
    labels = {tuple(image.flatten().tolist()): label.item() for image, label in zip(*source, strict=True)}
    drawn = scenes(source, 400, torch.Generator().manual_seed(0))
    for cells, said in zip(split_patches(drawn.images, 8, 8), drawn.cells, strict=True):
        assert [labels[tuple(cell.flatten().tolist())] if cell.any() else -1 for cell in cells] == said.tolist()
    counts = torch.bincount((drawn.cells >= 0).sum(1), minlength=5)
    assert counts[0] == 0
    assert counts[1:].min() > 70


def test_pictures_repeat_under_their_seed():
    source = read_digits("test")
    for draw in (lambda seed: cluttered(source, 5, (3, 3), seed), lambda seed: scenes(source, 5, seed)):
        one, two, other = (draw(torch.Generator().manual_seed(seed)).images for seed in (0, 0, 1))
        assert torch.equal(one, two)
        assert not torch.equal(one, other)


def test_it_learns_and_its_checkpoint_can_be_used(config_file, tmp_path):
    config_file.write_text(CONFIG.replace("steps = 60", "steps = 120"))
    result = run.train("digits", directory=tmp_path / "run", config_file=config_file)
    assert result["accuracy"] > 0.6
    trained = checkpoint.load(tmp_path / "run" / "checkpoint")
    assert isinstance(trained.module, VisionTransformer)
    assert trained.labels[7] == "seven"
    assert run.evaluate(tmp_path / "run" / "checkpoint") == pytest.approx(result, abs=1e-6)


@pytest.mark.parametrize("attention", ["hard", "soft", "mean"])
def test_in_clutter_it_learns_with_every_kind_of_attention(attention, config_file, tmp_path):
    config_file.write_text(CONFIG + CLUTTER.format(attention=attention))
    result = run.train("digits-hard", directory=tmp_path / "run", config_file=config_file)
    trained = checkpoint.load(tmp_path / "run" / "checkpoint")
    assert isinstance(trained.module, HardVision)
    assert trained.module.config.attention == attention
    assert result["accuracy"] > 0.2
    if attention == "hard":
        assert result["location_accuracy"] > 0.6


def test_an_interrupted_run_continues_as_if_it_never_was_its_baseline_included(config_file, tmp_path, monkeypatch):
    config_file.write_text(
        CONFIG.replace("steps = 60", "steps = 8").replace("every = 20", "every = 4") + CLUTTER.format(attention="hard")
    )
    run.train("digits-hard", directory=tmp_path / "whole", config_file=config_file)
    step, steps = loop._step, iter(range(100))

    def interrupted(*arguments):
        if next(steps) == 6:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train("digits-hard", directory=tmp_path / "parts", config_file=config_file)
    run.train("digits-hard", directory=tmp_path / "parts", config_file=config_file, resume=True)
    whole, parts = (torch.load(tmp_path / name / loop.SNAPSHOT, weights_only=True) for name in ("whole", "parts"))
    assert whole["module"].keys() == parts["module"].keys()
    assert "1.value" in whole["module"]
    assert all(torch.equal(whole["module"][name], parts["module"][name]) for name in whole["module"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("distortion = 0.3", "distortion = -1.0", r"distortion is -1\.0; it must be at least 0"),
        ("distortion = 0.3", "dropout = 1.0", r"dropout is 1\.0; it must lie in \[0, 1\)"),
        ("num_classes = 10", "num_classes = 9", r"\(1, 8, 8, 9\); digits need \(1, 8, 8, 10\)"),
        ("height = 8", "height = 12", r"\(1, 12, 8, 10\); digits need \(1, 8, 8, 10\)"),
        ("patch_size = 4", "patch_size = 3", "height is 8; it must be a multiple of patch_size, 3"),
    ],
)
def test_a_wrong_configuration_names_field_value_and_limit(old, new, message):
    assert old in CONFIG
    with pytest.raises(ConfigError, match=message):
        from_table(digits.DigitsConfig, loads(CONFIG.replace(old, new)))


def test_variants_differ_from_their_recipe_in_their_attention_alone():
    plain, mean = (_committed(name) for name in ("digits", "digits_mean"))
    assert mean["model"]["encoder"]["stack"].pop("attention") == "mean"
    assert plain == mean
    hard, soft, mean = (_committed(name) for name in ("digits_hard", "digits_soft", "digits_hard_mean"))
    assert hard["clutter"].pop("entropy_weight") > 0
    assert [table["clutter"].pop("attention") for table in (hard, soft, mean)] == ["hard", "soft", "mean"]
    assert hard == soft == mean


def test_the_committed_classifier_reaches_its_figure():
    assert run.evaluate(CHECKPOINTS / "digits")["accuracy"] >= 0.98


def test_the_committed_hard_attention_finds_and_names_digits_that_nobody_showed_it():
    figures = run.evaluate(CHECKPOINTS / "digits-hard")
    assert figures["accuracy"] >= 0.98
    assert figures["location_accuracy"] >= 0.99
    assert figures["random_accuracy"] <= 0.25


def _contains(image, patch):
    height, width = patch.shape
    windows = image.unfold(0, height, 1).unfold(1, width, 1)
    return bool((windows == patch).all(-1).all(-1).any())


def _committed(name):
    return loads((Path(run.__file__).with_name(f"{name}.toml")).read_text())
