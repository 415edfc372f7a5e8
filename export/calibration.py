"""How large the activations of a decoder or an encoder are, component by component, on a text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.rewrite import LayerSizes
from models.decoder import Decoder
from models.encoder import Encoder

NUM_TOKENS, WINDOW = 2048, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInputs:
    """What the attention and the feed-forward block of an encoder's layer read of some texts, both [T, E]."""

    attention: Tensor
    feed_forward: Tensor


def measure_inputs(encoder: Encoder, texts: Sequence[NDArray[np.int64]]) -> tuple[LayerInputs, ...]:
    """Return the inputs of each of the encoder's own layers; one that is applied several times has several times T.

    Args:
        encoder: run on each text [S] alone.
        texts: token ids, as they are served.
    """
    inputs: dict[nn.Module, list[Tensor]] = {}

    def keep(module: nn.Module, given: tuple[Tensor]) -> None:
        inputs.setdefault(module, []).append(given[0][0])

    readers = [(layer.attention.query, layer.feed_forward.up) for layer in encoder.stack.layers]
    handles = [module.register_forward_pre_hook(keep) for pair in readers for module in pair]
    try:
        with torch.no_grad():
            for text in texts:
                encoder(torch.from_numpy(text)[None])
    finally:
        for handle in handles:
            handle.remove()
    return tuple(
        LayerInputs(attention=torch.cat(inputs[query]), feed_forward=torch.cat(inputs[up])) for query, up in readers
    )


def measure_sizes(decoder: Decoder, text: NDArray[np.int64]) -> tuple[LayerSizes, ...]:
    """Return each layer's sizes over the beginning of `text`, in windows that know nothing of each other."""
    window = min(WINDOW, decoder.config.max_model_len)
    num_windows = max(1, min(NUM_TOKENS, len(text)) // window)
    sums: dict[nn.Module, Tensor] = {}

    def add_squares(module: nn.Module, inputs: tuple[Tensor]) -> None:
        squares = inputs[0].double().square().mean(dim=(0, 1)) / num_windows
        sums[module] = sums.get(module, 0) + squares

    handles = [
        module.register_forward_pre_hook(add_squares)
        for layer in decoder.layers
        for module in (layer.attention.output, layer.feed_forward.down)
    ]
    try:
        with torch.no_grad():
            for start in range(0, num_windows * window, window):
                decoder(torch.from_numpy(text[None, start : start + window]))
    finally:
        for handle in handles:
            handle.remove()

    def size(module: nn.Module) -> Tensor:
        return sums[module].sqrt().float()

    return tuple(
        LayerSizes(context=size(layer.attention.output), hidden=size(layer.feed_forward.down))
        for layer in decoder.layers
    )
