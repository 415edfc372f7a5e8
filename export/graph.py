"""The served graph of a decoder: one step, prefill or decode, with a KV cache that it extends in place.

B rows, S new tokens of each, T = B * S, E model width, N query heads, K key/value heads, D head width, M capacity,
L logit rows. The residual stream is kept flat, [T, E]: only attention needs to know which row a token belongs to.
Inputs and outputs are those of docs/bundle.md. It shares the decoder's tensors and is never run in PyTorch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from export import operators
from export.weights import Affine, DecoderWeights, LayerWeights, NormWeights
from models.decoder import DecoderConfig

LinearFactory = Callable[[Sequence[Affine]], nn.Module]


class StepGraph(nn.Module):
    """Token ids and a KV cache in, logits of the wanted positions and the extended cache out."""

    def __init__(self, weights: DecoderWeights, linear: LinearFactory, max_model_len: int) -> None:
        """Build the graph.

        Args:
            weights: what the graph computes with.
            linear: makes the one module for all linear maps that share an input.
            max_model_len: longest sequence, which bounds the position tables.
        """
        super().__init__()
        config = weights.config
        self.config = config
        self.register_buffer("token_embedding", weights.token_embedding)
        self.register_buffer(
            "positions", None if weights.positions is None else weights.positions[:max_model_len].clone()
        )
        self.rotation = (
            RotationTables(max_model_len, config.head_dim, config.rope_theta) if config.positions == "rotary" else None
        )
        self.layers = nn.ModuleList(_Layer(layer, linear, weights) for layer in weights.layers)
        self.attention_norms = nn.ModuleList(_Norm(layer.attention_norm, config) for layer in weights.layers)
        self.final_norm = _Norm(weights.final_norm, config)
        self.lm_head = linear([weights.lm_head])

    def forward(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        total_length: Tensor,
        logits_index: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run one step.

        Args:
            token_ids: int64 [B, S], new tokens.
            lengths: int32 [B], tokens of each row after this step.
            total_length: int32 [], M.
            logits_index: int64 [L], flat positions whose logits are wanted.
            past: keys and values [B, K, M, D] of each layer.

        Returns:
            Logits [L, vocabulary], and `past` extended.
        """
        last_position = lengths - 1
        hidden = self._embed(token_ids, last_position)
        normalised = self.attention_norms[0](hidden)
        present = []
        for index, layer in enumerate(self.layers):
            is_last = index == len(self.layers) - 1
            context, *extended = layer.attend(
                normalised, past[index], token_ids.shape, last_position, total_length, self.rotation
            )
            present.append(tuple(extended))
            if is_last:
                # Behind the last attention nothing mixes positions: only the wanted ones go on.
                context, hidden = context.index_select(0, logits_index), hidden.index_select(0, logits_index)
            next_norm = self.final_norm if is_last else self.attention_norms[index + 1]
            normalised, hidden = layer.advance(context, hidden, next_norm)
        return self.lm_head(normalised), present

    def _embed(self, token_ids: Tensor, last_position: Tensor) -> Tensor:
        """Return the embeddings [T, E] of the new tokens, positions added where the model adds any."""
        hidden = nn.functional.embedding(token_ids.reshape(-1), self.token_embedding)
        if self.positions is None:
            return hidden
        tokens = token_ids.shape[1]
        first = last_position[:, None].long() - (tokens - 1)
        # A padded row has fewer tokens than columns: those in front of position 0 are never read, but must exist.
        position = (first + torch.arange(tokens)[None]).clamp(min=0)
        return hidden + nn.functional.embedding(position.reshape(-1), self.positions)


class _Layer(nn.Module):
    """Attention and feed-forward, around which the norms are fused with the residual additions."""

    def __init__(self, layer: LayerWeights, linear: LinearFactory, weights: DecoderWeights) -> None:
        super().__init__()
        self.config = weights.config
        self.query_key_value = linear([layer.query, layer.key, layer.value])
        self.output = linear([layer.output])
        self.feed_forward_norm = _Norm(layer.feed_forward_norm, weights.config)
        self.gate_up = linear([layer.up] if layer.gate is None else [layer.gate, layer.up])
        self.down = linear([layer.down])

    def attend(
        self,
        normalised: Tensor,
        past: tuple[Tensor, Tensor],
        shape: torch.Size,
        last_position: Tensor,
        total_length: Tensor,
        rotation: "RotationTables | None",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the heads' context [T, N * D] and the extended keys and values."""
        config = self.config
        context, key, value = operators.group_query_attention(
            self.query_key_value(normalised).reshape(*shape, -1),
            past,
            last_position,
            total_length,
            None if rotation is None else (rotation.cosines, rotation.sines),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            rotary_interleaved=config.rope_interleaved,
        )
        return context.reshape(-1, context.shape[2]), key, value

    def advance(self, context: Tensor, hidden: Tensor, next_norm: "_Norm") -> tuple[Tensor, Tensor]:
        """Finish the layer; return the input of the next one, normalised and as it is."""
        normalised, hidden = self.feed_forward_norm.after(self.output(context), hidden)
        return next_norm.after(self.down(self._activate(self.gate_up(normalised))), hidden)

    def _activate(self, hidden: Tensor) -> Tensor:
        match self.config.activation:
            case "swiglu":
                gate, up = hidden.chunk(2, dim=-1)
                return operators.silu(gate) * up
            case "gelu":
                return nn.functional.gelu(hidden)
            case "gelu_tanh":
                return nn.functional.gelu(hidden, approximate="tanh")
            case "relu":
                return nn.functional.relu(hidden)
            case unknown:
                raise ValueError(f"activation is {unknown!r}: export knows swiglu, gelu, gelu_tanh and relu")


class _Norm(nn.Module):
    """An RMS norm, or with a bias a layer norm."""

    def __init__(self, norm: NormWeights, config: DecoderConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.register_buffer("gain", norm.gain)
        self.register_buffer("bias", norm.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise [T, E]."""
        if self.bias is None:
            return operators.rms_norm(hidden, self.gain, self.eps)
        return operators.layer_norm(hidden, self.gain, self.bias, self.eps)

    def after(self, update: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Add `update` to the residual stream `hidden`; return the sum, normalised and as it is."""
        return operators.skip_norm(update, hidden, self.gain, self.bias, self.eps)


class RotationTables(nn.Module):
    """Cosines and sines [max_model_len, D / 2] of rotary positions."""

    def __init__(self, max_model_len: int, head_dim: int, theta: float) -> None:
        super().__init__()
        frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.outer(torch.arange(max_model_len, dtype=torch.float64), frequency)
        self.register_buffer("cosines", angle.cos().float())
        self.register_buffer("sines", angle.sin().float())
