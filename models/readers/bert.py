"""Reader of Hugging Face directories of the BERT family, and of what sentence-transformers adds to say how to embed.

`huggingface` finds and loads the files; this file translates the configuration and renames the weights. What
`architectures` names decides: a masked language model, a classifier, a tagger, or else the encoder alone.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import EmbeddingInfo
from models.classifier import Classifier, ClassifierConfig, Tagger
from models.encoder import Encoder, EncoderConfig, StackConfig
from models.masked_lm import MaskedLanguageModel
from models.model import Model
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
    "projection": "embedding_projection",
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
_POOLER = {"pooler.dense.weight": "pooler.weight", "pooler.dense.bias": "pooler.bias"}
_CLASSES = {"classifier.weight": "head.weight", "classifier.bias": "head.bias"}
_HEAD = {
    "cls.predictions.transform.dense.weight": "head.dense.weight",
    "cls.predictions.transform.dense.bias": "head.dense.bias",
    "cls.predictions.transform.LayerNorm.weight": "head.norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "head.norm.bias",
    "cls.predictions.bias": "head.output.bias",
}
_HEADS = {*_HEAD, *_POOLER, *_CLASSES}
# Next-sentence prediction, a table of 0, 1, 2, ... and copies of tied tensors: nothing that is served.
_UNUSED = re.compile(r"cls\.seq_relationship\.|embeddings\.position_ids$|cls\.predictions\.decoder\.(weight|bias)$")
_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


def build(directory: Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Model:
    """Return what `architectures` names, or else the encoder, in evaluation mode.

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
    own, head = _rename(tensors, config.max_source_len)
    weights = {f"encoder.{name}": tensor for name, tensor in own.items()}
    match _architecture(document):
        case "BertForMaskedLM":
            return MaskedLanguageModel.from_weights(config, weights | _renamed(head, _HEAD))
        case "BertForSequenceClassification":
            return Classifier.from_weights(
                _classes(config, document, head), weights | _renamed(head, _POOLER | _CLASSES)
            )
        case "BertForTokenClassification":
            return Tagger.from_weights(_classes(config, document, head), weights | _renamed(head, _CLASSES))
        case _:
            return Encoder.from_weights(config, own)


def read_labels(document: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of the classes in their order; None where there are none to name."""
    names = document.get("id2label")
    if names is None or not str(_architecture(document)).endswith(
        ("ForSequenceClassification", "ForTokenClassification")
    ):
        return None
    return tuple(str(name) for _, name in sorted(names.items(), key=lambda pair: int(pair[0])))


def _architecture(document: Mapping[str, Any]) -> str | None:
    return next(iter(document.get("architectures") or ()), None)


def _classes(config: EncoderConfig, document: Mapping[str, Any], head: Mapping[str, Tensor]) -> ClassifierConfig:
    """Return the configuration of a classifier: as many classes as it has weights for."""
    if "classifier.weight" not in head:
        raise ReadError("classifier.weight is missing: the directory holds no trained classifier")
    return ClassifierConfig(
        encoder=config,
        num_classes=len(head["classifier.weight"]),
        multi_label=document.get("problem_type") == "multi_label_classification",
    )


def _renamed(head: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {names[name]: tensor for name, tensor in head.items() if name in names}


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
        d_embedding=document.get("embedding_size"),
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
            share_layers=document.get("share_layers", False),
        ),
    )


def _max_source_len(directory: Path, document: Mapping[str, Any]) -> int:
    """Return the longest text in tokens: the table of positions ends there, or the authors advise no more."""
    limit: int = document["max_position_embeddings"]
    path = directory / "sentence_bert_config.json"
    advised = read_json(path).get("max_seq_length") if path.is_file() else None
    return limit if advised is None else min(limit, advised)


def _rename(tensors: Mapping[str, Tensor], max_source_len: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the encoder's tensors under our names, and those of heads under their own, all as float32.

    Unknown names stay with the encoder, to be refused by name.
    """
    weights: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("bert.")
        if _UNUSED.search(short):
            continue
        values = tensor.to(torch.float32)
        if short in _HEADS:
            head[short] = values
        elif (match := re.fullmatch(r"embeddings\.(\w+)\.(weight|bias)", short)) and match[1] in _EMBEDDINGS:
            if match[1] == "position_embeddings":
                values = values[:max_source_len].clone()
            weights[f"{_EMBEDDINGS[match[1]]}.{match[2]}"] = values
        elif (match := re.fullmatch(r"encoder\.layer\.(\d+)\.([\w.]+)\.(weight|bias)", short)) and match[2] in _LAYER:
            weights[f"stack.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"] = values
        else:
            weights[name] = tensor
    return weights, head
