"""The fields of `SamplingParams`: the caller's value in its range, else the bundle's default, else the API's."""

import math
import secrets
from collections.abc import Callable

from attendant.bundle import SamplingDefaults
from attendant.v1 import generation_pb2 as pb
from service.errors import InvalidField
from service.scheduling.request import SamplingParams

MAX_LOGIT_BIASES = 1024


def read_sampling(sampling: pb.SamplingParams, defaults: SamplingDefaults, vocab_size: int) -> SamplingParams:
    """Return how the next token is chosen; an absent seed is drawn.

    Raises:
        InvalidField: a field is not finite or out of range.
    """
    read = _Reader(sampling)
    top_k = sampling.top_k if sampling.HasField("top_k") else defaults.top_k or 0
    if top_k < 0:
        raise InvalidField("sampling.top_k", top_k, "must be at least 0")
    return SamplingParams(
        temperature=read("temperature", defaults.temperature, 1.0, lambda x: 0 <= x <= 10, "in [0, 10]"),
        top_k=top_k,
        top_p=read("top_p", defaults.top_p, 1.0, lambda x: 0 < x <= 1, "in (0, 1]"),
        min_p=read("min_p", None, 0.0, lambda x: 0 <= x < 1, "in [0, 1)"),
        repetition_penalty=read(
            "repetition_penalty", defaults.repetition_penalty, 1.0, lambda x: 0 < x <= 10, "in (0, 10]"
        ),
        presence_penalty=read("presence_penalty", None, 0.0, lambda x: -2 <= x <= 2, "in [-2, 2]"),
        frequency_penalty=read("frequency_penalty", None, 0.0, lambda x: -2 <= x <= 2, "in [-2, 2]"),
        logit_bias=_read_logit_bias(sampling, vocab_size),
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
    )


class _Reader:
    """Reads optional floats: the caller's, else the bundle's default, else the API's."""

    def __init__(self, sampling: pb.SamplingParams) -> None:
        self._sampling = sampling

    def __call__(
        self, name: str, bundle_default: float | None, default: float, holds: Callable[[float], bool], limit: str
    ) -> float:
        if not self._sampling.HasField(name):
            return default if bundle_default is None else bundle_default
        value: float = getattr(self._sampling, name)
        if not (math.isfinite(value) and holds(value)):
            raise InvalidField(f"sampling.{name}", _shown(value), f"must be {limit}")
        return value


def _read_logit_bias(sampling: pb.SamplingParams, vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases = sampling.logit_bias
    if len(biases) > MAX_LOGIT_BIASES:
        raise InvalidField("sampling.logit_bias", f"{len(biases)} entries", f"at most {MAX_LOGIT_BIASES}")
    for token_id, bias in biases.items():
        if not 0 <= token_id < vocab_size:
            raise InvalidField("sampling.logit_bias", token_id, f"token ids go from 0 to {vocab_size - 1}")
        if not -100 <= bias <= 100:  # NaN is in no range
            raise InvalidField(f"sampling.logit_bias[{token_id}]", _shown(bias), "must be in [-100, 100]")
    return tuple(sorted(biases.items()))


def _shown(value: float) -> float:
    """Return a float32 as its shortest decimal, which is what the caller wrote."""
    return float(f"{value:.7g}")
