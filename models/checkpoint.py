"""Checkpoints: a model with its tokenizers and its provenance, in a directory.

`config.json` holds the family, the configuration, special ids and provenance; `tokenizer.json`, and
`source_tokenizer.json` where the source is text of its own, are in the format of Hugging Face tokenizers;
`model.safetensors` holds the weights under the model's own names. It does not know where weights came from.
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.config import from_table
from models.families import FAMILIES, family_of
from models.model import Model

FORMAT = "attendant-checkpoint-2"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
SOURCE_TOKENIZER = "source_tokenizer.json"
WEIGHTS = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerInfo:
    """A tokenizer and the ids with a meaning of their own.

    `json` is a whole Hugging Face tokenizers file. Generation ends at any of `eos_token_ids`; `add_bos` says
    whether a prompt begins with `bos_token_id`; `chat_template` is Jinja; `mask_token_id` stands where a token is to be
    filled in.
    """

    json: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    add_bos: bool
    chat_template: str | None
    mask_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.add_bos and self.bos_token_id is None:
            raise ValueError("add_bos is true; it needs a bos_token_id")


Pooling = Literal["mean", "cls", "max", "last"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingInfo:
    """How one vector is made of a text's tokens: their mean, the first, the largest of each component, or the last.

    `normalize` scales it to unit length.
    """

    pooling: Pooling
    normalize: bool

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling is {self.pooling!r}; it must be one of {', '.join(get_args(Pooling))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A model that can be used: weights, tokenizers, and where they come from.

    `tokenizer` is that of the text that is generated or, where none is, of the text that is read; None where there
    is no text. `source_tokenizer` is that of an encoder's source if it differs. `labels` name a classifier's classes.
    `embedding` says how an encoder's vectors become one.
    `source` names the origin, `licence` is an SPDX identifier where one exists, `recipe` and `data` are set for
    models trained here; `synthetic` says that weights are random, for sizing only.
    """

    module: Model
    tokenizer: TokenizerInfo | None
    source: str
    licence: str
    source_tokenizer: TokenizerInfo | None = None
    labels: tuple[str, ...] | None = None
    embedding: EmbeddingInfo | None = None
    recipe: str | None = None
    data: str | None = None
    synthetic: bool = False


def save(model: TrainedModel, directory: str | Path, *, half: bool = False) -> None:
    """Write a checkpoint atomically: it appears whole, and replaces an older checkpoint of that name.

    With `half` weights are rounded to half precision, which `load` turns back into float32.

    Raises:
        CheckpointError: the directory exists and is no checkpoint.
    """
    directory = Path(directory)
    if directory.exists() and not (directory / CONFIG).is_file():
        raise CheckpointError(f"{directory} exists and is not a checkpoint; choose another directory or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        weights = model.module.weights()
        if half:
            weights = {name: tensor.half() for name, tensor in weights.items()}
        save_file(weights, scratch / WEIGHTS)
        document = {
            "format": FORMAT,
            "family": family_of(model.module),
            "config": asdict(model.module.config),
            "tokenizer": _write_tokenizer(model.tokenizer, scratch / TOKENIZER),
            "source_tokenizer": _write_tokenizer(model.source_tokenizer, scratch / SOURCE_TOKENIZER),
            "labels": model.labels,
            "embedding": None if model.embedding is None else asdict(model.embedding),
            "source": model.source,
            "licence": model.licence,
            "recipe": model.recipe,
            "data": model.data,
            "synthetic": model.synthetic,
        }
        (scratch / CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        scratch.chmod(0o755)  # mkdtemp makes directories private, and save_file files
        (scratch / WEIGHTS).chmod(0o644)
        if directory.exists():
            retired = scratch.with_name(f"{scratch.name}-old")
            os.rename(directory, retired)
            os.rename(scratch, directory)
            shutil.rmtree(retired)
        else:
            os.rename(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load(directory: str | Path) -> TrainedModel:
    """Read a checkpoint; the model is in evaluation mode.

    Raises:
        CheckpointError: a file is missing or malformed, or weights and configuration disagree.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} is not a whole checkpoint: {name} is missing")
    try:
        document = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise CheckpointError(f"{directory / CONFIG} is not of format {FORMAT}")
        return _assemble(document, directory)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{directory} does not fit together: {error}") from error


def _assemble(document: dict[str, Any], directory: Path) -> TrainedModel:
    model_class = FAMILIES.get(document["family"])
    if model_class is None:
        raise CheckpointError(
            f"{directory / CONFIG}: family is {document['family']!r}; known are {', '.join(sorted(FAMILIES))}"
        )
    labels, embedding = document["labels"], document.get("embedding")
    # The configuration has no nulls that matter: a field that is absent takes its default.
    config = from_table(model_class.config_class, _without_nulls(document["config"]))
    return TrainedModel(
        module=model_class.from_weights(config, load_weights(directory / WEIGHTS)),
        tokenizer=_read_tokenizer(document["tokenizer"], directory / TOKENIZER),
        source_tokenizer=_read_tokenizer(document["source_tokenizer"], directory / SOURCE_TOKENIZER),
        labels=None if labels is None else tuple(labels),
        embedding=None if embedding is None else EmbeddingInfo(**embedding),
        source=document["source"],
        licence=document["licence"],
        recipe=document["recipe"],
        data=document["data"],
        synthetic=document.get("synthetic", False),
    )


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file; half precision becomes float32."""
    weights = load_file(path)
    return {name: tensor.float() if tensor.dtype is torch.float16 else tensor for name, tensor in weights.items()}


def _write_tokenizer(tokenizer: TokenizerInfo | None, path: Path) -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    path.write_text(tokenizer.json, encoding="utf-8")
    document = asdict(tokenizer)
    del document["json"]
    return document


def _read_tokenizer(document: dict[str, Any] | None, path: Path) -> TokenizerInfo | None:
    if document is None:
        return None
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not a whole checkpoint: {path.name} is missing")
    eos_token_ids = tuple(document["eos_token_ids"])
    return TokenizerInfo(**document | {"json": path.read_text(encoding="utf-8"), "eos_token_ids": eos_token_ids})


def _without_nulls(table: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_nulls(value) if isinstance(value, dict) else value
        for name, value in table.items()
        if value is not None
    }
