"""Reader of GGUF files, the format of llama.cpp: Llama and GPT-2 families, byte-level BPE tokenizers.

Every tensor type that `gguf.dequantize` knows becomes float32. The attention rows of Llama files are ordered for
interleaved rotary positions, and stay so.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from torch import Tensor

from models.checkpoint import TrainedModel
from models.decoder import Decoder, DecoderConfig
from models.readers.errors import ReadError
from models.readers.gguf_tokenizer import read_tokenizer

# GGUF's word for a module, and ours. A layer's tensors begin with "blk.<layer>.".
_MODULES = {
    "token_embd": "token_embedding",
    "position_embd": "position_embedding",
    "output_norm": "final_norm",
    "output": "lm_head",
}
_LAYER_MODULES = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.query",
    "attn_k": "attention.key",
    "attn_v": "attention.value",
    "attn_output": "attention.output",
    "ffn_norm": "feed_forward_norm",
    "ffn_up": "feed_forward.up",
    "ffn_gate": "feed_forward.gate",
    "ffn_down": "feed_forward.down",
}
# Metadata that changes what a Llama computes, with the only values that are supported.
_REFUSED = {
    "rope.scaling.type": (None, "none"),
    "rope.scale_linear": (None, 1.0),
    "expert_count": (None, 0),
    "attention.sliding_window": (None, 0),
    "logit_scale": (None, 1.0),
    "embedding_scale": (None, 1.0),
    "residual_scale": (None, 1.0),
    "attention.scale": (None,),
}


def read(path: str | Path) -> TrainedModel:
    """Read a GGUF file.

    Raises:
        ReadError: the file is damaged, or holds an architecture, feature, tokenizer or tensor type that is not
            supported; tensors are missing or surplus. The message names what.
    """
    path = Path(path)
    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ReadError(f"{path} is no readable GGUF file: {error}") from error
    try:
        weights = _translate({tensor.name: _float32(tensor) for tensor in reader.tensors})
        config = _config(metadata, weights)
        tokenizer = read_tokenizer(metadata)
        decoder = Decoder.from_weights(config, weights)
    except KeyError as error:
        raise ReadError(f"{path}: the metadata lacks {error.args[0]}") from error
    except ValueError as error:
        raise ReadError(f"{path}: {error}") from error
    name = metadata.get("general.name", path.stem)
    return TrainedModel(
        module=decoder,
        tokenizer=tokenizer,
        source=f"{name} ({path.name})",
        licence=metadata.get("general.license", "unknown"),
    )


def _float32(tensor: ReaderTensor) -> Tensor:
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ReadError(f"tensor {tensor.name} has type {tensor.tensor_type.name}, which cannot be read") from error
    return torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: the file is mapped read-only


def _translate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors to ours and split the fused projection of GPT-2; unknown names stay, to be refused by name."""
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        top = re.fullmatch(r"(\w+)\.(weight|bias)", name)
        if layer and layer[2] == "attn_qkv":
            for part, values in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                weights[f"layers.{layer[1]}.attention.{part}.{layer[3]}"] = values.clone()
        elif layer and layer[2] in _LAYER_MODULES:
            weights[f"layers.{layer[1]}.{_LAYER_MODULES[layer[2]]}.{layer[3]}"] = tensor
        elif top and top[1] in _MODULES:
            weights[f"{_MODULES[top[1]]}.{top[2]}"] = tensor
        else:
            weights[name] = tensor
    return weights


def _config(metadata: Mapping[str, Any], weights: Mapping[str, Tensor]) -> DecoderConfig:
    """Translate the metadata; what GGUF leaves to the tensors (biases, tied embeddings) is read off them."""
    architecture = metadata["general.architecture"]
    if architecture not in ("llama", "gpt2"):
        raise ReadError(f"architecture {architecture!r} is not supported; known are 'llama' and 'gpt2'")
    for name, supported in _REFUSED.items():
        value = metadata.get(f"{architecture}.{name}")
        if value not in supported:
            raise ReadError(f"{architecture}.{name} is {value!r}, which is not supported")

    def size(name: str) -> Any:
        return metadata[f"{architecture}.{name}"]

    num_heads = size("attention.head_count")
    head_dim = metadata.get(f"{architecture}.attention.key_length", size("embedding_length") // num_heads)
    common = {
        "vocab_size": metadata.get(f"{architecture}.vocab_size", len(metadata["tokenizer.ggml.tokens"])),
        "d_model": size("embedding_length"),
        "num_layers": size("block_count"),
        "num_heads": num_heads,
        "head_dim": head_dim,
        "d_ff": size("feed_forward_length"),
        "max_model_len": size("context_length"),
        "tie_embeddings": "lm_head.weight" not in weights,
    }
    if architecture == "gpt2":
        return DecoderConfig(
            **common,
            num_kv_heads=num_heads,
            positions="learned",
            norm="layer",
            norm_eps=size("attention.layer_norm_epsilon"),
            activation="gelu_tanh",
            bias="all",
        )
    rotated = metadata.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ReadError(f"llama.rope.dimension_count is {rotated}; partial rotary positions are not supported")
    biases = {name.split(".")[-2] for name in weights if name.startswith("layers.0.") and name.endswith(".bias")}
    return DecoderConfig(
        **common,
        num_kv_heads=metadata.get("llama.attention.head_count_kv", num_heads),
        positions="rotary",
        rope_theta=metadata.get("llama.rope.freq_base", 10000.0),
        rope_interleaved=True,
        norm="rms",
        norm_eps=size("attention.layer_norm_rms_epsilon"),
        activation="swiglu",
        bias="none" if not biases else "qkv" if biases == {"query", "key", "value"} else "all",
    )
