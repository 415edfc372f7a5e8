"""Reader of Hugging Face directories: safetensors (sharded too), config.json, tokenizer.json.

Llama, Mistral and Qwen2 (one architecture under three names), GPT-2, and the BERT family (`bert`, `albert`).
`huggingface_config` translates the configuration, `huggingface_tokenizer` the tokenizer; this file finds the weights
and renames them.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.checkpoint import EmbeddingInfo, TrainedModel
from models.decoder import Decoder, DecoderConfig
from models.model import Model
from models.readers import bert
from models.readers.albert import as_bert
from models.readers.errors import ReadError
from models.readers.huggingface_config import translate
from models.readers.huggingface_tokenizer import read_tokenizer
from models.readers.json_file import read_json

# Their word for a module, and ours; a layer's are looked up without the layer's prefix.
_LLAMA = {
    "embed_tokens": "token_embedding",
    "norm": "final_norm",
    "lm_head": "lm_head",
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "post_attention_layernorm": "feed_forward_norm",
    "mlp.up_proj": "feed_forward.up",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.down_proj": "feed_forward.down",
}
_GPT2 = {
    "wte": "token_embedding",
    "wpe": "position_embedding",
    "ln_f": "final_norm",
    "lm_head": "lm_head",
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.output",
    "ln_2": "feed_forward_norm",
    "mlp.c_fc": "feed_forward.up",
    "mlp.c_proj": "feed_forward.down",
}
# Causal masks and rotary tables that older checkpoints carry as tensors; they hold no knowledge.
_BUFFERS = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")


def read(directory: str | Path) -> TrainedModel:
    """Read a directory that `save_pretrained` wrote, or a clone of a hub repository.

    Raises:
        ReadError: a file is missing or damaged; the architecture, a feature or the tokenizer is not supported; tensors
            are missing or surplus. The message names what.
    """
    directory = Path(directory)
    try:
        document = read_json(directory / "config.json")
        module, embedding = _build(directory, document)
        tokenizer = read_tokenizer(directory, document, continues=isinstance(module, Decoder))
    except KeyError as error:
        raise ReadError(f"{directory}: config.json lacks {error.args[0]}") from error
    except (OSError, UnicodeDecodeError, SafetensorError) as error:
        raise ReadError(f"{directory} cannot be read: {error}") from error
    except ValueError as error:
        raise ReadError(f"{directory}: {error}") from error
    return TrainedModel(
        module=module,
        tokenizer=tokenizer,
        embedding=embedding,
        labels=bert.read_labels(document),
        source=directory.name,
        licence=_licence(directory),
    )


def _build(directory: Path, document: dict[str, Any]) -> tuple[Model, EmbeddingInfo | None]:
    """Return the model, and how it embeds texts if that is known."""
    if document.get("model_type") == "bert":
        return bert.build(directory, document, _load(directory)), bert.read_embedding(directory)
    if document.get("model_type") == "albert":
        settings, tensors = as_bert(document, _load(directory))
        return bert.build(directory, settings, tensors), bert.read_embedding(directory)
    config = translate(document)
    return Decoder.from_weights(config, _rename(_load(directory), document["model_type"], config)), None


def _load(directory: Path) -> dict[str, Tensor]:
    """Return all tensors, from one file or from the shards that an index lists."""
    index = directory / "model.safetensors.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in files:
        tensors |= load_file(directory / name)
    return tensors


def _rename(tensors: dict[str, Tensor], model_type: str, config: DecoderConfig) -> dict[str, Tensor]:
    """Rename tensors to ours, as float32; unknown names stay, to be refused by name."""
    names = _GPT2 if model_type == "gpt2" else _LLAMA
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _BUFFERS.search(name):
            continue
        match = re.fullmatch(r"(?:transformer\.|model\.)?(?:(?:h|layers)\.(\d+)\.)?([\w.]+)\.(weight|bias)", name)
        if match is None or match[2] not in names:
            weights[name] = tensor
            continue
        prefix = "" if match[1] is None else f"layers.{match[1]}."
        module, kind, values = names[match[2]], match[3], tensor.to(torch.float32)
        if model_type == "gpt2" and match[1] is not None and values.dim() == 2:
            values = values.T.contiguous()  # GPT-2 stores linear layers as (in, out)
        if module == "attention.qkv":
            for part, rows in zip(("query", "key", "value"), values.chunk(3), strict=True):
                weights[f"{prefix}attention.{part}.{kind}"] = rows.clone()
        else:
            weights[f"{prefix}{module}.{kind}"] = values
    if config.tie_embeddings and (head := weights.pop("lm_head.weight", None)) is not None:
        embedding = weights.get("token_embedding.weight")
        if embedding is None or not torch.equal(head, embedding):
            raise ReadError("tie_word_embeddings is true, but lm_head.weight differs from the token embedding")
    return weights


def _licence(directory: Path) -> str:
    """Return the licence that a model card's front matter names, or "unknown"."""
    card = directory / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    match = re.search(r"\A---\n(?:.*\n)*?license:\s*(\S+)", text)
    return match[1] if match else "unknown"
