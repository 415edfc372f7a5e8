"""How large a decoder's activations are, component by component, on a text."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.rewrite import LayerSizes
from models.decoder import Decoder

NUM_TOKENS, WINDOW = 2048, 512


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
