"""The nouns of scheduling: what a request asks for, and what comes out of it."""

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

PATIENCE_SECONDS = 60.0
"""How long a request without a deadline is taken to be willing to wait: so those with later ones do not pass it."""


class FinishReason(Enum):
    """Why a request ended well."""

    STOP = "stop"
    EOS = "eos"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen; validated at the border, in `service/rpc`."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0  # unsigned 64 bits

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken; a temperature this low makes it certain."""
        return self.temperature < 1e-5

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits are changed before the choice, by penalties or bias."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or bool(self.logit_bias)
        )


@dataclass(frozen=True, slots=True)
class Source:
    """What an answer is about, where the model reads it apart from the prompt: a text's tokens, or an image.

    `pixels` are float32 in the machine's byte order; nobody but the engine looks into them.
    """

    token_ids: tuple[int, ...] = ()
    pixels: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beam:
    """Search for the most likely answers instead of choosing token by token.

    The log-likelihood of an answer of n tokens, the one that ends it included, is divided by
    ((5 + n) / 6) ** length_penalty (Wu et al., 2016, arXiv:1609.08144); the best `num_answers` of `width` are returned.
    """

    width: int
    length_penalty: float = 1.0
    num_answers: int = 1

    def score(self, log_likelihood: float, num_tokens: int) -> float:
        """Return what answers are ordered by."""
        return log_likelihood / float(((5 + num_tokens) / 6) ** self.length_penalty)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as the scheduler sees it: token ids only, every default resolved.

    Positions are half-open intervals: the prompt is [0, len(prompt)), the answer at most
    [len(prompt), len(prompt) + max_tokens). With a `source` the prompt is what the answer begins with.
    """

    request_id: str
    prompt: tuple[int, ...]
    source: Source | None = None
    max_tokens: int
    min_tokens: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: frozenset[int] = frozenset()  # empty when the caller ignores them
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: bool = False
    top_logprobs: int = 0
    beam: Beam | None = None
    priority: int = 0  # larger is more urgent
    tenant: str = ""  # among whom the engine's time is shared
    arrival: float  # seconds of the engine's monotonic clock
    deadline: float | None = None  # the same clock
    may_reuse: bool = True  # whether its prompt may begin with what another left behind

    @property
    def max_total_tokens(self) -> int:
        """Positions that the whole sequence can come to occupy."""
        return len(self.prompt) + self.max_tokens

    @property
    def due(self) -> float:
        """When it should be finished: at its deadline, or else as if it could wait for a minute."""
        return self.arrival + PATIENCE_SECONDS if self.deadline is None else self.deadline

    @property
    def num_slots(self) -> int:
        """Slots that it needs at once."""
        return 1 if self.beam is None else self.beam.width

    @property
    def num_prompt(self) -> int:
        """Tokens that are read: those of the source and of the prompt."""
        return len(self.prompt) + (len(self.source.token_ids) if self.source else 0)

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end the answer."""
        return self.eos_token_ids | self.stop_token_ids


class Token(NamedTuple):
    """One generated token; `logprob` and `top` only if asked for, under the unmodified distribution."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """An answer that a beam search found; answers are ordered by `score`.

    `token_ids` include the token that ended it, if one did; `log_likelihood` is in nats.
    """

    token_ids: tuple[int, ...]
    reason: FinishReason
    log_likelihood: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """How and when a request ended well; durations in seconds. A beam search ends with its answers, the best first."""

    reason: FinishReason
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    cached_tokens: int = 0
    hypotheses: tuple[Hypothesis, ...] = ()
