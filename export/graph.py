"""The fast graph of a decoder: one step, prefill or decode, with a KV cache that it extends in place.

B rows, S new tokens of each, T = B * S, E model width, N query heads, K key/value heads, D head width, M capacity,
L logit rows. The residual stream is kept flat, [T, E]: only attention needs to know which row a token belongs to.
Inputs and outputs are those of docs/bundle.md. It shares the decoder's tensors and is never run in PyTorch.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from export import operators
from export.layers import Norm, activate
from export.linear import Kernels
from export.weights import CrossWeights, DecoderWeights, LayerWeights, pack
from models.decoder_config import DecoderConfig

KeyValue = tuple[Tensor, Tensor]


class _Step(NamedTuple):
    """What attention must know of a step.

    That is B and S, int32 [B] index of each row's last position, int32 [] capacity, and the mask of sources
    [B, 1, S, source], None where all of a source is real or there is none.
    """

    shape: torch.Size
    last_position: Tensor
    total_length: Tensor
    source_mask: Tensor | None


class StepGraph(nn.Module):
    """Token ids and a KV cache in, logits of the wanted positions and the extended cache out."""

    def __init__(self, weights: DecoderWeights, kernels: Kernels, max_model_len: int) -> None:
        """Build the graph.

        Args:
            weights: what the graph computes with.
            kernels: how it multiplies.
            max_model_len: longest sequence, which bounds the position tables.
        """
        super().__init__()
        self.config = weights.config
        self.token_embedding = kernels.embedding(weights.token_embedding)
        self.register_buffer(
            "positions", None if weights.positions is None else weights.positions[:max_model_len].clone()
        )
        cosines, sines = weights.rotation or (None, None)
        self.register_buffer("cosines", None if cosines is None else cosines[:max_model_len].clone())
        self.register_buffer("sines", None if sines is None else sines[:max_model_len].clone())
        self.layers = nn.ModuleList(_Layer(layer, kernels, self.config) for layer in weights.layers)
        self.final_norm = Norm(weights.final_norm, self.config.norm_eps)
        self.lm_head = kernels.logits([weights.lm_head])

    def forward(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        total_length: Tensor,
        logits_index: Tensor,
        source_lengths: Tensor | None,
        states: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Run one step.

        Args:
            token_ids: int64 [B, S], new tokens.
            lengths: int32 [B], tokens of each row after this step.
            total_length: int32 [], M.
            logits_index: int64 [L], flat positions whose logits are wanted.
            source_lengths: int32 [B], how much of each row's source is real, where that differs.
            states: of each layer keys and values [B, K, M, D] of the past and, where there is a source, those of it.

        Returns:
            Logits float32 [L, vocabulary], and the keys and values of the past extended.
        """
        each = len(states) // len(self.layers)
        source_mask = None
        if source_lengths is not None:
            valid = torch.arange(states[2].shape[2]) < source_lengths[:, None]
            # Spelt out for every query: the operator refuses a mask that broadcasts over them.
            source_mask = valid[:, None, None].expand(-1, 1, token_ids.shape[1], -1)
        step = _Step(token_ids.shape, lengths - 1, total_length, source_mask)
        rotation = None if self.cosines is None else (self.cosines, self.sines)
        hidden = self._embed(token_ids, step)
        normalised = self.layers[0].attention_norm(hidden)
        present: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            is_last = index == len(self.layers) - 1
            key, value, *source = states[index * each : (index + 1) * each]
            context, *extended = layer.attend(normalised, (key, value), step, rotation)
            present += extended
            if layer.cross is not None:
                context, hidden = layer.attend_to_source(context, hidden, source, step)
            if is_last:
                # Behind the last attention nothing mixes positions: only the wanted ones go on.
                context, hidden = context.index_select(0, logits_index), hidden.index_select(0, logits_index)
            next_norm = self.final_norm if is_last else self.layers[index + 1].attention_norm
            normalised, hidden = layer.advance(context, hidden, next_norm)
        return self.lm_head(normalised)[0].float(), present

    def _embed(self, token_ids: Tensor, step: _Step) -> Tensor:
        """Return the embeddings [T, E] of the new tokens, positions added where the model adds any."""
        hidden = self.token_embedding(token_ids.reshape(-1))
        if self.positions is None:
            return hidden
        # Counted down to 0, so that the number of tokens, which the host knows, never meets a tensor of the device.
        behind = torch.arange(step.shape[1] - 1, -1, -1)
        position = step.last_position[:, None].long() - behind
        return hidden + self.positions.index_select(0, position.reshape(-1))


class _Layer(nn.Module):
    """Attention and feed-forward, between norms that are fused with the residual additions."""

    def __init__(self, layer: LayerWeights, kernels: Kernels, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_norm = Norm(layer.attention_norm, config.norm_eps)
        self.query_key_value = kernels.normalised([pack(layer.query, layer.key, layer.value)])
        self.output = kernels.context([layer.output])
        self.cross = None if layer.cross is None else _Cross(layer.cross, kernels, config)
        self.feed_forward_norm = Norm(layer.feed_forward_norm, config.norm_eps)
        # Two products rather than one and a Split, whose copy costs more than it saves.
        self.up = kernels.normalised([layer.up] if layer.gate is None else [layer.gate, layer.up])
        self.down = kernels.hidden([layer.down])

    def attend(
        self, normalised: Tensor, past: KeyValue, step: _Step, rotation: KeyValue | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the heads' context [T, N * D], and the extended keys and values."""
        (query_key_value,) = self.query_key_value(normalised)
        context, key, value = operators.group_query_attention(
            query_key_value.reshape(*step.shape, -1),
            past,
            step.last_position,
            step.total_length,
            rotation,
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            rotary_interleaved=self.config.rope_interleaved,
            window=self.config.window,
        )
        return context.reshape(-1, context.shape[2]), key, value

    def attend_to_source(
        self, context: Tensor, hidden: Tensor, source: list[Tensor], step: _Step
    ) -> tuple[Tensor, Tensor]:
        """Add what the tokens said to each other, and return what the heads read of the source, and the sum."""
        (update,) = self.output(context)
        normalised, hidden = self.cross.norm.after(update, hidden)
        return self.cross(normalised, *source, step), hidden

    def advance(self, context: Tensor, hidden: Tensor, next_norm: Norm) -> tuple[Tensor, Tensor]:
        """Finish the layer; return the input of the next one, normalised and as it is."""
        (update,) = (self.output if self.cross is None else self.cross.output)(context)
        normalised, hidden = self.feed_forward_norm.after(update, hidden)
        (update,) = self.down(activate(self.config.activation, *self.up(normalised)))
        return next_norm.after(update, hidden)


class _Cross(nn.Module):
    """Attention to a source whose keys and values were made once."""

    def __init__(self, weights: CrossWeights, kernels: Kernels, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm = Norm(weights.norm, config.norm_eps)
        self.query = kernels.normalised([weights.query])
        self.output = kernels.context([weights.output])

    def forward(self, normalised: Tensor, key: Tensor, value: Tensor, step: _Step) -> Tensor:
        """Return the heads' context [T, N * D] of tokens [T, E]."""
        (query,) = self.query(normalised)
        heads = query.reshape(*step.shape, self.num_heads, -1).transpose(1, 2)  # [B, N, S, D]
        context = operators.cross_attention(heads, key, value, step.source_mask)
        return context.transpose(1, 2).reshape(query.shape)
