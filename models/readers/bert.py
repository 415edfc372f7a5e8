"""Reader of Hugging Face directories of the BERT family, and of what sentence-transformers adds to say how to embed.

`huggingface` finds and loads the files; this file translates the configuration and renames the weights. The pooler and
the heads that BERT was pretrained with are left out, unless the directory is that of a masked language model.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import EmbeddingInfo
from models.encoder import Encoder, EncoderConfig, StackConfig
from models.masked_lm import MaskedLanguageModel
from models.readers.errors import ReadError
from models.readers.json_file import read_json

# Fields that change what a model computes, with the only values that are supported.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": (None, "absolute"),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "quantization_config": (None,),
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_EMBEDDINGS = {
    "word_embeddings": "token_embedding",
    "position_embeddings": "position_embedding",
    "token_type_embeddings": "segment_embedding",
    "LayerNorm": "embedding_norm",
}
_LAYER = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down",
    "output.LayerNorm": "feed_forward_norm",
}
_HEAD = {
    "cls.predictions.transform.dense.weight": "head.dense.weight",
    "cls.predictions.transform.dense.bias": "head.dense.bias",
    "cls.predictions.transform.LayerNorm.weight": "head.norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "head.norm.bias",
    "cls.predictions.bias": "head.output.bias",
}
# The pooler, next-sentence prediction, a table of 0, 1, 2, ... and copies of tied tensors: nothing that is served.
_UNUSED = re.compile(
    r"pooler\.|cls\.seq_relationship\.|embeddings\.position_ids$|cls\.predictions\.decoder\.(weight|bias)$"
)
_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


def build(directory: Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Encoder | MaskedLanguageModel:
    """Return the encoder, or the masked language model if `architectures` names one, in evaluation mode.

    Args:
        directory: where sentence-transformers may have left its own limit of length.
        document: the contents of config.json.
        tensors: all weights, by their original names.

    Raises:
        ReadError: a feature is not supported; the message names it.
        ValueError: tensors are missing, surplus or of another shape.
        KeyError: a field without a default is absent.
    """
    for name, values in _SUPPORTED.items():
        if document.get(name) not in values:
            raise ReadError(f"{name} is {document[name]!r}, which is not supported")
    config = _config(document, _max_source_len(directory, document))
    weights = _rename(tensors, config.max_source_len)
    if "BertForMaskedLM" not in document.get("architectures", ()):
        return Encoder.from_weights(config, {k: w for k, w in weights.items() if not k.startswith("head.")})
    model = {k if k.startswith("head.") else f"encoder.{k}": w for k, w in weights.items()}
    return MaskedLanguageModel.from_weights(config, model)


def read_embedding(directory: Path) -> EmbeddingInfo | None:
    """Return how sentence-transformers makes one vector of a text; None if the directory does not say.

    Raises:
        ReadError: it does something that is not supported.
    """
    path = directory / "modules.json"
    if not path.is_file():
        return None
    modules = _modules(path)
    if "Dense" in modules:
        raise ReadError("modules.json lists a Dense module after pooling, which is not supported")
    settings = read_json(directory / modules["Pooling"] / "config.json") if "Pooling" in modules else {}
    chosen = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value]
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise ReadError(f"pooling is {', '.join(chosen) or 'absent'}; exactly one of {', '.join(_POOLINGS)} is needed")
    return EmbeddingInfo(pooling=_POOLINGS[chosen[0]], normalize="Normalize" in modules)


def _modules(path: Path) -> dict[str, str]:
    """Return the folders of the modules by the last part of their type."""
    document = read_json(path, kind=list)
    return {module["type"].rpartition(".")[2]: module["path"] for module in document}


def _config(document: Mapping[str, Any], max_source_len: int) -> EncoderConfig:
    activation = document["hidden_act"]
    if activation not in _ACTIVATIONS:
        raise ReadError(f"hidden_act is {activation!r}; known are {', '.join(_ACTIVATIONS)}")
    return EncoderConfig(
        vocab_size=document["vocab_size"],
        max_source_len=max_source_len,
        positions="learned",
        num_segments=document.get("type_vocab_size", 2),
        embedding_norm=True,
        stack=StackConfig(
            d_model=document["hidden_size"],
            num_layers=document["num_hidden_layers"],
            num_heads=document["num_attention_heads"],
            d_ff=document["intermediate_size"],
            norm="layer",
            norm_eps=document["layer_norm_eps"],
            norm_first=False,
            activation=_ACTIVATIONS[activation],
            bias=True,
        ),
    )


def _max_source_len(directory: Path, document: Mapping[str, Any]) -> int:
    """Return the longest text in tokens: the table of positions ends there, or the authors advise no more."""
    limit: int = document["max_position_embeddings"]
    path = directory / "sentence_bert_config.json"
    advised = read_json(path).get("max_seq_length") if path.is_file() else None
    return limit if advised is None else min(limit, advised)


def _rename(tensors: Mapping[str, Tensor], max_source_len: int) -> dict[str, Tensor]:
    """Rename tensors to ours, as float32; unknown names stay, to be refused by name."""
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _UNUSED.search(name):
            continue
        short = name.removeprefix("bert.")
        values = tensor.to(torch.float32)
        if short in _HEAD:
            weights[_HEAD[short]] = values
        elif (match := re.fullmatch(r"embeddings\.(\w+)\.(weight|bias)", short)) and match[1] in _EMBEDDINGS:
            if match[1] == "position_embeddings":
                values = values[:max_source_len].clone()
            weights[f"{_EMBEDDINGS[match[1]]}.{match[2]}"] = values
        elif (match := re.fullmatch(r"encoder\.layer\.(\d+)\.([\w.]+)\.(weight|bias)", short)) and match[2] in _LAYER:
            weights[f"stack.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"] = values
        else:
            weights[name] = tensor
    return weights
