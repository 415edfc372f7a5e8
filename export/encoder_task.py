"""What an encoder is exported for: its head, the oracle that it is held to, and what the manifest says of it.

S tokens, E model width, C classes, V vocabulary, P places whose logits are wanted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attendant.bundle import LOGIT_ROWS, ROWS, TOKENS, Axis, Classes
from export.encode_runner import Row, Tokens
from export.errors import ExportRefused
from export.heads import ClassHead, FillHead, Head, TagHead, VectorHead
from export.linear import Kernels
from models.checkpoint import TrainedModel
from models.classifier import Classifier, Tagger
from models.encoder import Encoder
from models.masked_lm import MaskedLanguageModel


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderTask:
    """One use of an encoder.

    Args:
        name: the task as manifests name it.
        family: of the architecture.
        encoder: without its head.
        make_head: builds the head of the graph.
        axes: of the graph's output.
        oracle: what PyTorch computes of a row.
        classes: what the logits stand for, where they are classes.
    """

    name: Any
    family: str
    encoder: Encoder
    make_head: Callable[[Kernels], Head]
    axes: tuple[Axis, ...]
    oracle: Callable[[Row], NDArray[np.float32]]
    classes: Classes | None = None

    def row(self, token_ids: Tokens) -> Row:
        """Return a text, or a pair of texts where these are what is classified."""
        return Row.of(token_ids, is_pair=len(self.axes) == 2 and self.axes[0] == ROWS)


def task_of(model: TrainedModel) -> EncoderTask | None:
    """Return what a model is exported for; None if it is no encoder of texts.

    Raises:
        ExportRefused: the checkpoint lacks what serving needs.
    """
    module = model.module
    if isinstance(module, Encoder):
        return _vectors(model, module)
    if isinstance(module, MaskedLanguageModel):
        return _gaps(model, module)
    if isinstance(module, Classifier):
        return _classes(model, module)
    if isinstance(module, Tagger):
        return _tags(model, module)
    return None


def _vectors(model: TrainedModel, module: Encoder) -> EncoderTask:
    if model.embedding is None:
        raise ExportRefused("the checkpoint does not say how to embed a text (pooling): nothing is served of it")
    return EncoderTask(
        name="embed",
        family="encoder",
        encoder=module,
        make_head=lambda kernels: VectorHead(),
        axes=(ROWS, TOKENS, module.config.stack.d_model),
        oracle=lambda row: _first(module(torch.from_numpy(row.token_ids)[None])),
    )


def _gaps(model: TrainedModel, module: MaskedLanguageModel) -> EncoderTask:
    if model.tokenizer is None or model.tokenizer.mask_token_id is None:
        raise ExportRefused("the checkpoint's tokenizer has no mask_token_id: no gap can be marked")
    return EncoderTask(
        name="fill_mask",
        family="masked-lm",
        encoder=module.encoder,
        make_head=lambda kernels: FillHead(module, kernels),
        axes=(LOGIT_ROWS, module.config.vocab_size),
        oracle=lambda row: _first(module(torch.from_numpy(row.token_ids)[None]))[row.places],
    )


def _classes(model: TrainedModel, module: Classifier) -> EncoderTask:
    num_classes = module.config.num_classes
    return EncoderTask(
        name="classify" if num_classes > 1 else "score",
        family="classifier",
        encoder=module.encoder,
        make_head=lambda kernels: ClassHead(module, kernels),
        axes=(ROWS, num_classes),
        oracle=lambda row: _first(
            module(torch.from_numpy(row.token_ids)[None], segment_ids=_segments(module.encoder, row))
        ),
        classes=classes_of(model, num_classes, multi_label=module.config.multi_label) if num_classes > 1 else None,
    )


def _tags(model: TrainedModel, module: Tagger) -> EncoderTask:
    config = module.config
    return EncoderTask(
        name="tag",
        family="tagger",
        encoder=module.encoder,
        make_head=lambda kernels: TagHead(module),
        axes=(ROWS, TOKENS, config.num_classes),
        oracle=lambda row: _first(module(torch.from_numpy(row.token_ids)[None])),
        classes=classes_of(model, config.num_classes, multi_label=config.multi_label),
    )


def classes_of(model: TrainedModel, num_classes: int, *, multi_label: bool = False) -> Classes:
    """Return what the logits of a model stand for.

    Raises:
        ExportRefused: it has another number of labels than of classes.
    """
    labels = model.labels or ()
    if len(labels) != num_classes:
        raise ExportRefused(f"the checkpoint has {len(labels)} labels: the model tells {num_classes} classes apart")
    return Classes(labels=labels, multi_label=multi_label)


def _segments(encoder: Encoder, row: Row) -> torch.Tensor | None:
    return None if encoder.segment_embedding is None else torch.from_numpy(row.segment_ids)[None]


def _first(output: torch.Tensor) -> NDArray[np.float32]:
    return output.detach()[0].numpy()
