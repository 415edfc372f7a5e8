"""A model from a user's own file: what a function in it builds, with the weights of a checkpoint.

The function takes nothing and returns a `TrainedModel`; its module is a `models.model.Model` that generates step by
step: `state_specs()` declares what it remembers, `module(token_ids)` returns logits (B, T, V) of whole texts, and
`module(token_ids, state)` those of new tokens with the next state. A `Decoder` does so with any attention in its
layers.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from models.checkpoint import WEIGHTS, TrainedModel, load_weights
from models.model import Model


def read(module: str, checkpoint: Path | None) -> TrainedModel:
    """Build the model that "FILE.py:FUNCTION" names.

    Args:
        module: the file and the name of the function.
        checkpoint: a safetensors file, or a directory with model.safetensors, whose names are those of the model's
            `state_dict`; None keeps the weights that the function gave it.

    Raises:
        ValueError: the file or the function is missing, it returns something else, or the weights do not fit.
    """
    model = _function(module)()
    if not isinstance(model, TrainedModel):
        raise ValueError(f"{module} returned a {type(model).__name__}; it must be a models.checkpoint.TrainedModel")
    if not isinstance(model.module, Model):
        raise ValueError(f"{module}: the module is a {type(model.module).__name__}; it must be a models.model.Model")
    if checkpoint is not None:
        path = checkpoint / WEIGHTS if checkpoint.is_dir() else checkpoint
        try:
            model.module.assign(load_weights(path))
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"{path} does not fit {module}: {error}") from error
    model.module.eval()
    return model


def _function(module: str) -> Callable[[], object]:
    file, _, name = module.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--module {module}: there is no file {file!r}; give FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--module {module}: {file!r} is no Python file")
    own = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # it may import what lies beside it
    spec.loader.exec_module(own)
    function = getattr(own, name, None)
    if not callable(function):
        raise ValueError(f"--module {module}: {file!r} has no function {name!r}")
    return function
