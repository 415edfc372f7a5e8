"""The configuration of a decoder; one class covers the Llama and the GPT-2 families."""

from dataclasses import dataclass
from typing import Literal, get_args

from models.checks import check_choices, check_integers, check_positive
from models.layers import ACTIVATIONS, NORMS

Positions = Literal["rotary", "learned", "sinusoidal", "alibi", "none"]
Attention = Literal["softmax", "favor", "elu", "mean"]
WindowState = Literal["append", "ring"]
Norm = Literal["rms", "layer"]
Activation = Literal["swiglu", "gelu", "gelu_tanh", "relu"]
Bias = Literal["none", "qkv", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Sizes and choices that, with the weights, define a decoder.

    `max_model_len` counts tokens, prompt and output together. `bias` says which linear layers have one. `head_dim`
    may differ from d_model / num_heads. `rope_*` matter only where `positions` is "rotary", `num_features` only where
    `attention` is "favor", `window_state` only with a `window`; attention "mean" has neither heads nor use for rotary
    positions, and takes the place of cross-attention too. `scale_embeddings` multiplies token embeddings by the
    square root of d_model, as Vaswani et al. do where sinusoids are added to them.

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
    attention: Attention = "softmax"
    window: int | None = None
    window_state: WindowState = "append"
    num_features: int = 256
    qk_norm: bool = False
    softcap: float | None = None
    norm_first: bool = True
    scale_embeddings: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff")
        check_integers(self, 1, *sizes, "max_model_len", "window", "num_features")
        check_positive(self, "rope_theta", "norm_eps", "softcap")
        if self.attention == "longformer":
            raise ValueError("attention is 'longformer'; its global tokens see later ones: use 'softmax' with a window")
        check_choices(
            self,
            positions=get_args(Positions),
            norm=NORMS,
            activation=ACTIVATIONS,
            bias=get_args(Bias),
            attention=get_args(Attention),
            window_state=get_args(WindowState),
        )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads, {self.num_kv_heads}"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one")
        if self.attention != "softmax":
            if self.window is not None or self.softcap is not None:
                raise ValueError(
                    f"attention is {self.attention!r}; window and softcap need 'softmax', which has scores"
                )
            if self.positions == "alibi":
                raise ValueError(f"attention is {self.attention!r}; alibi needs 'softmax', which has scores to bias")
