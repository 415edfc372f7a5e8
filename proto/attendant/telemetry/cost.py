"""What a length costs, from the coefficients that a server's latency model has learned and exports."""

from collections.abc import Mapping
from math import isfinite
from typing import NamedTuple


class Law(NamedTuple):
    """What a phase costs, in seconds: each run, each token in it, each position that a token attends to."""

    constant: float
    linear: float
    quadratic: float

    def seconds(self, tokens: float, attended: float) -> float:
        """Return what one run of so many tokens and attended positions costs."""
        return self.constant + self.linear * tokens + self.quadratic * attended

    @property
    def is_known(self) -> bool:
        """Whether enough was observed; until then the coefficients are NaN."""
        return all(map(isfinite, self))


def predicted_seconds(latency: str, length: int, laws: Mapping[str, Law]) -> float | None:
    """Return what a length costs a request that computes alone, each phase in one run: no queue and no neighbours.

    Args:
        latency: "first token" of a prompt of this length, "between tokens" at a context of this length, or "request"
            of an encoder that reads this length.
        length: in tokens.
        laws: of the phases, "encode", "prefill" and "decode", that the model has.

    Returns:
        Seconds; None where no law is known, or where length alone does not decide: a generated answer's duration.
    """
    encode, prefill, decode = (laws.get(phase) for phase in ("encode", "prefill", "decode"))
    if latency == "between tokens":
        return decode.seconds(1, length) if decode else None
    if latency == "first token":
        if encode and decode:  # the length is that of a source, whose first token is decoded
            return encode.seconds(length, length * length) + decode.seconds(1, 1)
        return prefill.seconds(length, length * length / 2) if prefill else None
    return encode.seconds(length, length * length) if encode and not decode else None
