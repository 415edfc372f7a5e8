"""What the client hands out: small frozen values, no protobuf messages."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """An alternative at one position; `logprob` is a natural logarithm."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of a generated token and, if asked for, the most likely alternatives."""

    token_id: int
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of one request; `cached_tokens` are those of the prompt that were not computed again."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the server spent the time of one request, in seconds."""

    queue_seconds: float
    tokenise_seconds: float
    prefill_seconds: float
    decode_seconds: float
    total_seconds: float


FinishReason: TypeAlias = Literal["stop", "eos", "length", "unspecified"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The request is accepted; `seed` makes the same answer come again, `model` is "name/version".

    `source_labels` name the places of the source, where an alignment was asked for.
    """

    request_id: str
    model: str
    prompt_tokens: int
    seed: int
    source_labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """More of answer `index`. Texts concatenate to the whole; a text may be empty.

    `alignment` has, for each token, the weights of the places of the source, if asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0
    alignment: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Answer `index` is complete. A beam search gives its `score` and its `log_likelihood` in nats."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    index: int = 0
    score: float | None = None
    log_likelihood: float | None = None


Event: TypeAlias = Started | Delta | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole answer; with `others`, the next best of a beam search."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    started: Started
    finished: Finished
    others: tuple["Generation", ...] = ()
    alignment: tuple[tuple[float, ...], ...] = ()

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended: "stop", "eos" or "length"."""
        return self.finished.finish_reason

    @property
    def usage(self) -> Usage:
        """Its token counts."""
        return self.finished.usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Token ids, each as the vocabulary spells it, and the rendered conversation if there was one."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check of a bundle's certificate: `measured` had to be at most `bound`, over `grid`."""

    name: str
    measured: float
    bound: float
    grid: str


Pooling: TypeAlias = Literal["mean", "cls", "max", "last"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """The vector of one text, of how many tokens it was made, and whether the text was cut to them."""

    values: tuple[float, ...]
    tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """The vectors of several texts, in their order."""

    embeddings: tuple[Embedding, ...]
    model: str
    usage: Usage
    timings: Timings

    def __iter__(self) -> Iterator[tuple[float, ...]]:
        """Yield the vectors."""
        return (embedding.values for embedding in self.embeddings)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.embeddings)

    def __getitem__(self, index: int) -> tuple[float, ...]:
        """Return one vector."""
        return self.embeddings[index].values


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionHead:
    """One head: the entropy of each row in nats, and its weights, empty if entropies alone were asked for."""

    head: int
    entropies: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """One attention of a model; `rows` and `columns` are the names of its places.

    A row sees so many columns to the `left` and to the `right` of its own place, all where None.
    """

    kind: str
    layer: int
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    left: int | None
    right: int | None
    heads: tuple[AttentionHead, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Where a model looks; `target_ids` are what was written about a source."""

    model: str
    layers: tuple[AttentionLayer, ...]
    target_ids: tuple[int, ...]


ModelState: TypeAlias = Literal["loading", "ready", "unavailable", "unspecified"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A bundle of the server's repository; `reason` says why one is not served.

    It reads "text" or "image"; images have `image_shape`, channels, height and width in pixels. `max_source_len` is 0
    unless it writes about texts, `labels` are empty unless it tells classes apart.
    """

    name: str
    version: int
    state: ModelState
    reason: str
    family: str
    tasks: tuple[str, ...]
    precision: str
    max_model_len: int
    vocab_size: int
    has_chat_template: bool
    bundle_sha256: str
    source: str
    licence: str
    load_seconds: float
    checks: tuple[Check, ...]
    reads: str
    max_source_len: int
    labels: tuple[str, ...]
    image_shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """What to call it in a request: "name/version"."""
        return f"{self.name}/{self.version}"


Turn: TypeAlias = Message | tuple[str, str] | Mapping[str, str]
"""A turn of a conversation: a Message, (role, content), or {"role": ..., "content": ...}."""
