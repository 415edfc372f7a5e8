"""What every architecture here has in common: a configuration, declared ties, and a way to be built around weights."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from models.states import StateSpec

STD = 0.02


class Model(nn.Module):
    """A module that a frozen configuration and named tensors define completely.

    A subclass sets `config_class`, takes the configuration as the first argument of its constructor, and overrides
    `tied_names` and `tie` if some of its tensors are one.
    """

    config_class: ClassVar[type]
    step_tokens: int = 64
    """Most new tokens of a step where a model is traced; longer texts are fed in pieces of so many."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Declare what must be remembered between steps; nothing, unless the model goes step by step."""
        return ()

    @property
    def tied_names(self) -> tuple[str, ...]:
        """Names in the `state_dict` of tensors that are another's; checkpoints leave them out."""
        return ()

    def tie(self) -> None:
        """Make tied tensors one, after any was replaced."""

    @classmethod
    def from_weights(cls, config: Any, weights: Mapping[str, Tensor]) -> Self:
        """Build a model, in evaluation mode, around existing tensors named as in `state_dict`, the tied ones left out.

        Raises:
            ValueError: tensors are missing, surplus or of another shape; the message names them.
        """
        with torch.device("meta"):
            model = cls(config)
        model.assign(weights)
        return model.eval()

    def assign(self, weights: Mapping[str, Tensor]) -> None:
        """Put existing tensors, named as in `state_dict`, the tied ones left out, in the place of the model's own.

        Raises:
            ValueError: tensors are missing, surplus or of another shape; the message names them.
        """
        expected = {name: tuple(x.shape) for name, x in self.state_dict().items() if name not in self.tied_names}
        if missing := sorted(expected.keys() - weights.keys()):
            raise ValueError(f"missing tensors: {', '.join(missing)}")
        if surplus := sorted(weights.keys() - expected.keys()):
            raise ValueError(f"surplus tensors: {', '.join(surplus)}")
        for name, shape in expected.items():
            if tuple(weights[name].shape) != shape:
                raise ValueError(
                    f"tensor {name} has shape {tuple(weights[name].shape)}; the configuration gives {shape}"
                )
        self.load_state_dict(weights, strict=False, assign=True)
        self.tie()

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors that `from_weights` asks for."""
        return {name: x.detach().contiguous() for name, x in self.state_dict().items() if name not in self.tied_names}


def initialise(module: nn.Module, num_layers: int) -> None:
    """Draw weights as GPT-2 does: N(0, 0.02), smaller where a layer writes to the residual stream.

    Gains of norms become 1 and biases 0.
    """
    residual_std = STD / math.sqrt(2 * num_layers)
    for name, parameter in module.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            nn.init.normal_(parameter, std=residual_std if residual else STD)
