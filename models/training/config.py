"""What the configurations of all recipes share: how long a run is, and how it is optimised."""

import dataclasses
from typing import Any

from models.config import ConfigError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How long a run is, in optimiser steps, and the seed that everything random in it depends on.

    With `autocast` matrix products of the loss are computed in bfloat16: twice as fast on processors that have it.
    Weights and evaluation stay as they are.
    """

    seed: int
    steps: int
    batch_size: int
    evaluate_every: int
    autocast: bool = False

    def __post_init__(self) -> None:
        _at_least(self, seed=0, steps=1, batch_size=1, evaluate_every=1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserConfig:
    """AdamW with a linear warm-up and a cosine decay from `learning_rate` to `final_learning_rate`.

    Weight decay spares vectors (norms and biases); gradients are clipped to a total norm of `clip_norm`.
    """

    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    weight_decay: float
    beta1: float
    beta2: float
    clip_norm: float

    def __post_init__(self) -> None:
        _at_least(self, learning_rate=0.0, final_learning_rate=0.0, warmup_steps=0, weight_decay=0.0, clip_norm=0.0)
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")


def _at_least(config: Any, **limits: float) -> None:
    for name, limit in limits.items():
        if not getattr(config, name) >= limit:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be at least {limit}")
