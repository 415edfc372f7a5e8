"""Beam search over any encoder-decoder: the oracle that a served beam search is compared with.

Shapes: B sources, W beams, S source length, V target vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.states import State


class SequenceToSequence(Protocol):
    """What a search needs of a model; states carry whatever its mechanism must remember."""

    def encode(self, source: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Return the memory (B, S, E) of a batch of sources."""

    def begin(self, memory: Tensor, source_lengths: Tensor | None = None, capacity: int | None = None) -> State:
        """Return the state of empty targets of at most `capacity` tokens."""

    def decode(self, token_ids: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """Return logits (B, T, V) after each of the new target tokens (B, T), and the next state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """A finished target: its tokens, the end token left out, and their log-likelihood in nats, the end token included.

    `score` is the log-likelihood over the length penalty; hypotheses are ordered by it.
    """

    token_ids: tuple[int, ...]
    log_likelihood: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearch:
    """How to search.

    A hypothesis of n tokens, the end token included, is divided by ((5 + n) / 6) ** length_penalty (Wu et al., Google's
    Neural Machine Translation System, 2016, arXiv:1609.08144). One that reaches `max_tokens` without an end token is
    finished as it is. A width of 1 is greedy decoding.

    Raises:
        ValueError: a field is out of range.
    """

    width: int
    max_tokens: int
    start_token_id: int
    end_token_id: int
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("width", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.length_penalty >= 0:
            raise ValueError(f"length_penalty is {self.length_penalty}; it must be at least 0")

    def penalty(self, num_tokens: int) -> float:
        """Return what the log-likelihood of a hypothesis of so many tokens is divided by."""
        return ((5 + num_tokens) / 6) ** self.length_penalty


@torch.inference_mode()
def search(
    model: SequenceToSequence, source: Tensor, source_lengths: Tensor | None, options: BeamSearch
) -> list[list[Hypothesis]]:
    """Return for each source the finished hypotheses, at most `width`, the best first.

    Args:
        model: the model, in evaluation mode.
        source: (B, S, ...), what it encodes.
        source_lengths: (B,) int64, how much of each source is real; all when None.
        options: how to search.
    """
    width, rows = options.width, len(source)
    memory = model.encode(source, source_lengths)
    state = model.begin(memory, source_lengths, options.max_tokens).select(
        torch.arange(rows, device=memory.device).repeat_interleave(width)
    )
    token_ids = torch.full((rows * width, 1), options.start_token_id, device=memory.device)
    # All beams of a source start alike: only the first may be continued, or they would stay copies of each other.
    likelihood = torch.full((rows, width), -torch.inf, device=memory.device)
    likelihood[:, 0] = 0.0
    told = torch.empty(rows, width, 0, dtype=torch.int64, device=memory.device)
    finished: list[list[Hypothesis]] = [[] for _ in range(rows)]
    decided = [False] * rows  # a source that is decided takes no more, however long others go on
    for step in range(1, options.max_tokens + 1):
        logits, state = model.decode(token_ids, state)
        likelihoods = torch.log_softmax(logits[:, -1].float(), -1).unflatten(0, (rows, width)) + likelihood[..., None]
        vocab_size = likelihoods.shape[-1]
        # Each of W beams can end in one way, so 2 W candidates hold W that go on.
        best, index = likelihoods.flatten(1).topk(min(2 * width, width * vocab_size), dim=1)
        beam, token = index // vocab_size, index % vocab_size
        ends = token == options.end_token_id
        _finish(finished, decided, told, best, beam, ends, step, options)
        going = ends.int().argsort(dim=1, stable=True)[:, :width]  # the best W that do not end, in their order
        likelihood = best.masked_fill(ends, -torch.inf).gather(1, going)
        beam, token = beam.gather(1, going), token.gather(1, going)
        told = torch.cat((told.gather(1, beam[..., None].expand(-1, -1, told.shape[2])), token[..., None]), 2)
        decided = [
            done or _is_decided(found, alive, options)
            for done, found, alive in zip(decided, finished, likelihood[:, 0].tolist(), strict=True)
        ]
        if all(decided):
            break
        state = state.select((beam + torch.arange(rows, device=beam.device)[:, None] * width).flatten())
        token_ids = token.reshape(-1, 1)
    else:
        for row in (row for row in range(rows) if not decided[row]):
            for tokens, alive in zip(told[row].tolist(), likelihood[row].tolist(), strict=True):
                _add(finished[row], tokens, alive, options.max_tokens, options)
    return [sorted(found, key=lambda one: -one.score)[:width] for found in finished]


def _finish(
    finished: list[list[Hypothesis]], decided: list[bool], told: Tensor, best: Tensor, beam: Tensor, ends: Tensor,
    step: int, options: BeamSearch,
) -> None:  # fmt: skip
    """Add the candidates that end among the W best; one further down would not have stayed in the beam either."""
    for row, place in ends[:, : options.width].nonzero().tolist():
        if not decided[row]:
            tokens = told[row, int(beam[row, place])].tolist()
            _add(finished[row], tokens, float(best[row, place]), step, options)


def _add(
    found: list[Hypothesis], token_ids: list[int], likelihood: float, num_tokens: int, options: BeamSearch
) -> None:
    if likelihood > -torch.inf:
        score = likelihood / options.penalty(num_tokens)
        found.append(Hypothesis(token_ids=tuple(token_ids), log_likelihood=likelihood, score=score))


def _is_decided(found: list[Hypothesis], alive: float, options: BeamSearch) -> bool:
    """Say whether no beam that is alive can still come among the W best: likelihoods only fall.

    Greedy decoding, a width of 1, ends with its first hypothesis, whatever the length penalty could still prefer.
    """
    if len(found) < options.width or options.width == 1:
        return len(found) == options.width
    worst = sorted((one.score for one in found), reverse=True)[options.width - 1]
    return alive / options.penalty(options.max_tokens) <= worst
