"""The configuration of a Hugging Face decoder, translated once; what would change the computation is refused."""

from collections.abc import Mapping
from typing import Any

from models.decoder import DecoderConfig
from models.readers.errors import ReadError

_LLAMA_TYPES = ("llama", "mistral", "qwen2")
# Fields that change what a model computes, with the only values that are supported.
_LLAMA_REFUSED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "partial_rotary_factor": (None, 1.0),
    "use_sliding_window": (None, False),
    "quantization_config": (None,),
}
_GPT2_REFUSED: dict[str, tuple[Any, ...]] = {
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "add_cross_attention": (None, False),
    "quantization_config": (None,),
}
_GPT2_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


def translate(document: Mapping[str, Any]) -> DecoderConfig:
    """Return our configuration for the contents of a config.json.

    Raises:
        ReadError: the architecture or a feature is not supported; the message names it.
        KeyError: a field without a default is absent.
    """
    model_type = document.get("model_type")
    if model_type in _LLAMA_TYPES:
        return _llama(document)
    if model_type == "gpt2":
        return _gpt2(document)
    known = ", ".join((*_LLAMA_TYPES, "gpt2", "bert"))
    raise ReadError(f"model_type is {model_type!r}; known are {known}")


def _llama(document: Mapping[str, Any]) -> DecoderConfig:
    _refuse(document, _LLAMA_REFUSED)
    rope = document.get("rope_parameters") or {}  # what newer files call rope_scaling and rope_theta together
    _refuse(rope, {"rope_type": (None, "default"), "partial_rotary_factor": (None, 1.0)}, "rope_parameters.")
    if set(document.get("layer_types") or ()) - {"full_attention"} and _window_matters(document):
        raise ReadError(f"layer_types is {document['layer_types']!r}; only full_attention is supported")
    if document["model_type"] == "mistral" and _window_matters(document):
        raise ReadError(f"sliding_window is {document['sliding_window']}, which is not supported")
    num_heads = document["num_attention_heads"]
    return DecoderConfig(
        vocab_size=document["vocab_size"],
        d_model=document["hidden_size"],
        num_layers=document["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=document.get("num_key_value_heads") or num_heads,
        head_dim=document.get("head_dim") or document["hidden_size"] // num_heads,
        d_ff=document["intermediate_size"],
        max_model_len=document["max_position_embeddings"],
        positions="rotary",
        rope_theta=rope.get("rope_theta") or document.get("rope_theta") or 10000.0,
        rope_interleaved=False,
        norm="rms",
        norm_eps=document["rms_norm_eps"],
        activation="swiglu",
        bias=_llama_bias(document),
        tie_embeddings=document.get("tie_word_embeddings", False),
    )


def _window_matters(document: Mapping[str, Any]) -> bool:
    window = document.get("sliding_window")
    return window is not None and window < document["max_position_embeddings"]


def _llama_bias(document: Mapping[str, Any]) -> str:
    if document["model_type"] == "qwen2":
        return "qkv"
    attention, mlp = document.get("attention_bias", False), document.get("mlp_bias", False)
    if attention != mlp:
        raise ReadError(f"attention_bias is {attention} and mlp_bias {mlp}; only both or neither is supported")
    return "all" if attention else "none"


def _gpt2(document: Mapping[str, Any]) -> DecoderConfig:
    _refuse(document, _GPT2_REFUSED)
    activation = document.get("activation_function", "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        raise ReadError(f"activation_function is {activation!r}; known are {', '.join(_GPT2_ACTIVATIONS)}")
    d_model, num_heads = document["n_embd"], document["n_head"]
    return DecoderConfig(
        vocab_size=document["vocab_size"],
        d_model=d_model,
        num_layers=document["n_layer"],
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=d_model // num_heads,
        d_ff=document.get("n_inner") or 4 * d_model,
        max_model_len=document["n_positions"],
        positions="learned",
        norm="layer",
        norm_eps=document["layer_norm_epsilon"],
        activation=_GPT2_ACTIVATIONS[activation],
        bias="all",
        tie_embeddings=document.get("tie_word_embeddings", True),
    )


def _refuse(document: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]], prefix: str = "") -> None:
    for name, values in supported.items():
        if document.get(name) not in values:
            raise ReadError(f"{prefix}{name} is {document.get(name)!r}, which is not supported")
