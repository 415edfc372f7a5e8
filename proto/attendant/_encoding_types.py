"""What the client hands out for tasks of encoders: small frozen values, no protobuf messages."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from attendant._types import Timings, Usage


@dataclass(frozen=True, slots=True)
class Pixels:
    """The values of an image, from 0 to 1: `shape` is (channels, height, width), the last axis runs fastest."""

    shape: tuple[int, ...]
    values: Sequence[float]


Classifiable: TypeAlias = str | tuple[str, str] | bytes | Pixels | Sequence[int]
"""A text, a pair of texts, a PNG or JPEG file's bytes, pixels, or token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """One class: its place among the model's, its name, how probable it is, and its logit if that was asked for."""

    index: int
    label: str
    probability: float
    logit: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """What one input is: the classes, the most probable first."""

    classes: tuple[ClassScore, ...]
    tokens: int
    truncated: bool

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[0].label


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedToken:
    """A token, its most probable label, and the half-open range of characters where it stands in its text."""

    token_id: int
    token: str
    label: str
    probability: float
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tagging:
    """The tags of one text; `num_tokens` counts the special tokens around it too."""

    tokens: tuple[TaggedToken, ...]
    num_tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCandidate:
    """A token that might stand in a gap."""

    token_id: int
    token: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledMask:
    """A gap: its place among the tokens, and what might stand there, the most probable first."""

    position: int
    candidates: tuple[TokenCandidate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledText:
    """The gaps of one text."""

    masks: tuple[FilledMask, ...]
    tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """How relevant a text is to a query: as the model computed it, and as a probability."""

    score: float
    probability: float
    tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Classifications:
    """What several inputs are, in their order."""

    classifications: tuple[Classification, ...]
    model: str
    usage: Usage
    timings: Timings

    def __iter__(self) -> Iterator[Classification]:
        """Yield what each input is."""
        return iter(self.classifications)


@dataclass(frozen=True, slots=True, kw_only=True)
class Taggings:
    """The tags of several texts, in their order."""

    taggings: tuple[Tagging, ...]
    model: str
    usage: Usage
    timings: Timings

    def __iter__(self) -> Iterator[Tagging]:
        """Yield the tags of each text."""
        return iter(self.taggings)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledTexts:
    """The gaps of several texts, in their order."""

    texts: tuple[FilledText, ...]
    model: str
    usage: Usage
    timings: Timings

    def __iter__(self) -> Iterator[FilledText]:
        """Yield the gaps of each text."""
        return iter(self.texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The scores of several texts in the order of the request, and their places in it, the most relevant first."""

    scores: tuple[TextScore, ...]
    order: tuple[int, ...]
    model: str
    usage: Usage
    timings: Timings
