"""What an architecture's own export contributes to a bundle, and how it reports."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from attendant.bundle import Certificate, Classes, Embedding, Explain, Golden, GraphSpec, ImageInput, Limits, StateSpec

Report = Callable[[str], None]
"""Takes one line for every stage and check."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of a manifest that differ between architectures; the files they name are written."""

    family: Any
    tasks: tuple[Any, ...]
    limits: Limits
    graphs: tuple[GraphSpec, ...]
    golden: Golden
    certificate: Certificate
    states: tuple[StateSpec, ...] = ()
    embedding: Embedding | None = None
    explain: Explain | None = None
    image: ImageInput | None = None
    classes: Classes | None = None
    target: Literal["cpu", "cuda"] = "cpu"
