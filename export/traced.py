"""Graphs of any generating model, traced from its own PyTorch code: what a mechanism declares is what is served.

The states of a graph are those that the model declares. B rows, T new tokens, L logit rows, V vocabulary, S source.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from onnxscript.onnx_opset import opset24
from torch import Tensor, nn

from attendant.bundle import GraphSpec
from export.described import write_graph
from export.source import target_config
from models.model import Model
from models.states import State, StateRule

OPSET = 24


def _write_in_place(past, new, start):  # type: ignore[no-untyped-def]  # onnxscript reads no annotations here
    return opset24.TensorScatter(past, new, start, axis=2)


_TRANSLATIONS = {torch.ops.attendant.write_in_place.default: _write_in_place}


class TracedEncoder(nn.Module):
    """Sources in, what each sequence begins with out: the states that are made."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.names = [spec.name for spec in model.state_specs() if spec.made or spec.rule is StateRule.FIXED]

    def forward(self, source: Tensor, source_lengths: Tensor | None) -> list[Tensor]:
        """Encode sources [B, S] or images, of which the first int32 source_lengths [B] positions are real."""
        lengths = None if source_lengths is None else source_lengths.long()
        state = self.model.begin(self.model.encode(source, lengths), lengths)
        return [state.tensors[name] for name in self.names]


class TracedStep(nn.Module):
    """New tokens and the states before them in, logits of the wanted positions and the states after them out."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.specs = model.state_specs()

    def forward(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        total_length: None,
        logits_index: Tensor,
        source_lengths: Tensor | None,
        past: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Run one step.

        Args:
            token_ids: int64 [B, T], all real.
            lengths: int32 [B], tokens of each row after this step.
            total_length: nothing; states tell their capacity themselves.
            logits_index: int64 [L], flat positions whose logits are wanted.
            source_lengths: int32 [B], or None where sources are all of one length, or none are.
            past: the states in their order.
        """
        state = State(
            specs=self.specs,
            tensors={spec.name: tensor for spec, tensor in zip(self.specs, past, strict=True)},
            lengths=lengths.long() - token_ids.shape[1],
            capacity=target_config(self.model).max_model_len,
            source_lengths=None if source_lengths is None else source_lengths.long(),
        )
        step = getattr(self.model, "decode", self.model)
        logits, state = step(token_ids, state)
        present = [state.tensors[spec.name] for spec in self.specs if spec.rule is not StateRule.FIXED]
        return logits.flatten(0, 1).index_select(0, logits_index), present


def write_traced_encoder(model: Model, graph: GraphSpec, directory: Path) -> None:
    """Trace how a model reads sources and write the graph into `directory`."""
    write_graph(TracedEncoder(model), graph, directory, opset=OPSET)


def write_traced_step(model: Model, graph: GraphSpec, directory: Path, *, max_tokens: int) -> None:
    """Trace how a model takes at most `max_tokens` new tokens and write the graph into `directory`."""
    module = TracedStep(model)
    write_graph(module, graph, directory, max_tokens=max_tokens, opset=OPSET, translations=_TRANSLATIONS)
