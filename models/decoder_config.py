"""The configuration of a decoder; one class covers the Llama and the GPT-2 families."""

from dataclasses import dataclass
from typing import Literal, get_args

from models.layers import ACTIVATIONS, NORMS

Positions = Literal["rotary", "learned", "sinusoidal"]
Norm = Literal["rms", "layer"]
Activation = Literal["swiglu", "gelu", "gelu_tanh", "relu"]
Bias = Literal["none", "qkv", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Sizes and choices that, with the weights, define a decoder.

    `max_model_len` counts tokens, prompt and output together. `bias` says which linear layers have one. `head_dim`
    may differ from d_model / num_heads. `rope_*` matter only where `positions` is "rotary".

    Raises:
        ValueError: a field is out of range; the message names the field, its value and the limit.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_model_len: int
    positions: Positions
    rope_theta: float = 10000.0
    rope_interleaved: bool = False
    norm: Norm
    norm_eps: float
    activation: Activation
    bias: Bias
    tie_embeddings: bool

    def __post_init__(self) -> None:
        for name in (
            *("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff"),
            "max_model_len",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
        for name, allowed in (
            ("positions", get_args(Positions)),
            ("norm", tuple(NORMS)),
            ("activation", tuple(ACTIVATIONS)),
            ("bias", get_args(Bias)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be above 0")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads, {self.num_kv_heads}"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one")
