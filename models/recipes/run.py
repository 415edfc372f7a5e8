"""Runs a recipe by its name: reads its configuration, guards its directory, remembers what it was started with."""

import importlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from models import checkpoint
from models.config import ConfigError, from_file

RECIPES = (
    "caption",
    "caption-mean",
    "dates",
    "dates-luong",
    "dates-mean",
    "digits",
    "digits-hard",
    "digits-hard-mean",
    "digits-mean",
    "digits-soft",
    "g2p",
    "g2p-mean",
    "lm",
    "lm-mean",
    "lm-performer",
    "lm-small",
    "lm-window",
    "mlm",
    "mlm-causal",
    "mlm-mean",
    "needle",
    "needle-mean",
    "needle-window",
    "sequences-copy",
    "sequences-mean",
    "sequences-reverse",
    "sequences-sort",
)
"""A name with a hyphen is a variant: the recipe before the hyphen, with another configuration."""
CONFIG = "recipe.json"


def train(
    name: str, *, directory: Path, config_file: Path | None = None, seed: int | None = None, resume: bool = False
) -> dict[str, float]:
    """Run the recipe `name` in `directory` and return the figures of its last evaluation.

    Args:
        name: one of `RECIPES`.
        directory: where everything of the run is written; new, unless it is resumed.
        config_file: TOML; the file of that name, hyphens as underscores, when None.
        seed: in place of the configuration's.
        resume: continue the run that `directory` holds; it gives the same result as one without interruption.

    Raises:
        ConfigError: the configuration is wrong, or differs from that of the run to be resumed.
        FileExistsError: the directory holds a run, and `resume` is false.
        FileNotFoundError: the configuration file or its text is missing, or there is no run to resume.
    """
    config = configuration(name, config_file)
    if seed is not None:
        config = replace(config, run=replace(config.run, seed=seed))
    _open(directory, {"recipe": name, **asdict(config)}, resume=resume)
    return _module(name).run(config, directory)


def configuration(name: str, config_file: Path | None = None) -> Any:
    """Return the configuration of a recipe, from its own file or another; see `train`."""
    path = Path(__file__).with_name(f"{name.replace('-', '_')}.toml") if config_file is None else config_file
    return from_file(_module(name).CONFIG, path)


def evaluate(directory: Path) -> dict[str, float]:
    """Return the figures of a checkpoint that a recipe has trained, on data that it was not trained on.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: no recipe has made it.
    """
    trained = checkpoint.load(directory)
    if trained.recipe not in RECIPES:
        raise ConfigError(f"{directory} comes from the recipe {trained.recipe!r}; known are {', '.join(RECIPES)}")
    figures: dict[str, float] = _module(trained.recipe).evaluate(trained)
    return figures


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"models.recipes.{name.partition('-')[0]}")


def _open(directory: Path, document: dict[str, object], *, resume: bool) -> None:
    path = directory / CONFIG
    if resume:
        if not path.is_file():
            raise FileNotFoundError(f"{directory} holds no run to resume")
        if json.loads(path.read_text(encoding="utf-8")) != document:
            raise ConfigError(f"the configuration differs from that of the run in {directory}, {path}")
        return
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; resume its run, or choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
