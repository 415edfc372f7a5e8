"""Reader of ALBERT in Hugging Face's form: its tensors and its configuration under BERT's names, which `bert` reads.

ALBERT is BERT with narrow embeddings and a single layer that is applied again and again. Source: Lan et al., 2019,
arXiv:1909.11942.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.readers.errors import ReadError

_LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0."
_SUPPORTED: dict[str, tuple[Any, ...]] = {"num_hidden_groups": (None, 1), "inner_group_num": (None, 1)}
_MODULES = {
    f"{_LAYER}attention.query": "encoder.layer.0.attention.self.query",
    f"{_LAYER}attention.key": "encoder.layer.0.attention.self.key",
    f"{_LAYER}attention.value": "encoder.layer.0.attention.self.value",
    f"{_LAYER}attention.dense": "encoder.layer.0.attention.output.dense",
    f"{_LAYER}attention.LayerNorm": "encoder.layer.0.attention.output.LayerNorm",
    f"{_LAYER}ffn": "encoder.layer.0.intermediate.dense",
    f"{_LAYER}ffn_output": "encoder.layer.0.output.dense",
    f"{_LAYER}full_layer_layer_norm": "encoder.layer.0.output.LayerNorm",
    "albert.encoder.embedding_hidden_mapping_in": "embeddings.projection",
    "predictions.dense": "cls.predictions.transform.dense",
    "predictions.LayerNorm": "cls.predictions.transform.LayerNorm",
    "predictions.decoder": "cls.predictions.decoder",
}
_POOLER = re.compile(r"albert\.pooler\.(weight|bias)$")


def as_bert(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and tensors under BERT's names; unknown ones stay, to be refused by name.

    Raises:
        ReadError: there is more than one group of layers.
    """
    for name, values in _SUPPORTED.items():
        if document.get(name) not in values:
            raise ReadError(f"{name} is {document[name]!r}, which is not supported")
    architectures = [name.replace("Albert", "Bert") for name in document.get("architectures") or ()]
    settings = {"layer_norm_eps": 1e-12} | dict(document) | {"architectures": architectures, "share_layers": True}
    return settings, {_name(name): tensor for name, tensor in tensors.items()}


def _name(name: str) -> str:
    if (pooler := _POOLER.fullmatch(name)) is not None:
        return f"pooler.dense.{pooler[1]}"
    module, _, kind = name.rpartition(".")
    if module in _MODULES:
        return f"{_MODULES[module]}.{kind}"
    if name == "predictions.bias":
        return "cls.predictions.bias"
    return name.removeprefix("albert.")
