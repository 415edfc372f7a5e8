"""Checkpoints: a decoder with its tokenizer and its provenance, in a directory.

`config.json` holds the configuration, special ids and provenance, `tokenizer.json` is in the format of Hugging
Face tokenizers, `model.safetensors` holds the weights under the decoder's own names. It does not know where weights
came from.
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models.decoder import Decoder, DecoderConfig

FORMAT = "attendant-checkpoint-1"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerInfo:
    """A tokenizer and the ids with a meaning of their own.

    `json` is a whole Hugging Face tokenizers file. Generation ends at any of `eos_token_ids`; `add_bos` says
    whether a prompt begins with `bos_token_id`; `chat_template` is Jinja.
    """

    json: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    add_bos: bool
    chat_template: str | None

    def __post_init__(self) -> None:
        if self.add_bos and self.bos_token_id is None:
            raise ValueError("add_bos is true; it needs a bos_token_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A decoder that can be used: weights, tokenizer, and where they come from.

    `source` names the origin, `licence` is an SPDX identifier where one exists, `recipe` and `data` are set for
    models trained here.
    """

    decoder: Decoder
    tokenizer: TokenizerInfo
    source: str
    licence: str
    recipe: str | None = None
    data: str | None = None


def save(model: TrainedModel, directory: str | Path) -> None:
    """Write a checkpoint atomically: it appears whole, and replaces an older checkpoint of that name.

    Raises:
        CheckpointError: the directory exists and is no checkpoint.
    """
    directory = Path(directory)
    if directory.exists() and not (directory / CONFIG).is_file():
        raise CheckpointError(f"{directory} exists and is not a checkpoint; choose another directory or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        weights = {name: tensor.detach().contiguous() for name, tensor in model.decoder.state_dict().items()}
        if model.decoder.config.tie_embeddings:
            del weights["lm_head.weight"]
        save_file(weights, scratch / WEIGHTS)
        (scratch / TOKENIZER).write_text(model.tokenizer.json, encoding="utf-8")
        tokenizer = asdict(model.tokenizer)
        del tokenizer["json"]
        document = {
            "format": FORMAT,
            "decoder": asdict(model.decoder.config),
            "tokenizer": tokenizer,
            "source": model.source,
            "licence": model.licence,
            "recipe": model.recipe,
            "data": model.data,
        }
        (scratch / CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        scratch.chmod(0o755)  # mkdtemp makes directories private
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
    """Read a checkpoint; the decoder is in evaluation mode.

    Raises:
        CheckpointError: a file is missing or malformed, or weights and configuration disagree.
    """
    directory = Path(directory)
    for name in (CONFIG, TOKENIZER, WEIGHTS):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} is not a whole checkpoint: {name} is missing")
    try:
        document = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise CheckpointError(f"{directory / CONFIG} is not of format {FORMAT}")
        tokenizer_json = (directory / TOKENIZER).read_text(encoding="utf-8")
        weights = load_file(directory / WEIGHTS)
        return _assemble(document, tokenizer_json, weights)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{directory} does not fit together: {error}") from error


def _assemble(document: dict[str, Any], tokenizer_json: str, weights: dict[str, Any]) -> TrainedModel:
    tokenizer = document["tokenizer"]
    tokenizer = tokenizer | {"json": tokenizer_json, "eos_token_ids": tuple(tokenizer["eos_token_ids"])}
    return TrainedModel(
        decoder=Decoder.from_weights(DecoderConfig(**document["decoder"]), weights),
        tokenizer=TokenizerInfo(**tokenizer),
        source=document["source"],
        licence=document["licence"],
        recipe=document["recipe"],
        data=document["data"],
    )
