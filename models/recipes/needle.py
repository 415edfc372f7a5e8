"""Recipe `needle`: an encoder finds one token of a rare class in a long text of noise, and names it at the front.

The first token is the query; it is the same in every text. The needle lies beyond what the windows of all layers
together reach, so only a global token, or attention without a window, can bring it to the query.

Shapes: B texts, S tokens, N needles.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models import checkpoint
from models.checkpoint import TrainedModel
from models.config import ConfigError
from models.encoder import Encoder, EncoderConfig
from models.training.config import OptimiserConfig, RunConfig
from models.training.loop import CHECKPOINT, Task, train

QUERY = 0
NUM_NEEDLES = 16
FIRST_NOISE = 1 + NUM_NEEDLES
NUM_TEST_TEXTS = 512
TEST_SEED = 2**62  # beyond the seeds of training steps


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleConfig:
    """The recipe. Texts have up to `num_tokens` tokens in training, and up to `encoder.max_source_len` in a test too.

    Token 0 is the query, the next 16 are needles, all others of `encoder.vocab_size` are noise.
    """

    run: RunConfig
    optimiser: OptimiserConfig
    encoder: EncoderConfig
    num_tokens: int

    def __post_init__(self) -> None:
        least, limit = 2 * reach(self.encoder) + 4, self.encoder.max_source_len
        if not least <= self.num_tokens <= limit:
            raise ConfigError(
                f"num_tokens is {self.num_tokens}; it must lie in {least}..{limit}: half a text is longer than the "
                "windows reach, and encoder.max_source_len is the most"
            )
        if self.encoder.vocab_size <= FIRST_NOISE:
            raise ConfigError(f"encoder.vocab_size is {self.encoder.vocab_size}; it must be above {FIRST_NOISE}")


CONFIG = NeedleConfig


class Texts(NamedTuple):
    """token_ids (B, S), how many of them are real, lengths (B,), and which needle they hide, (B,) below N; int64."""

    token_ids: Tensor
    lengths: Tensor
    needles: Tensor


def run(config: NeedleConfig, directory: Path) -> dict[str, float]:
    """Train in `directory`, continuing what is there; the checkpoint is its subdirectory `checkpoint`."""
    torch.manual_seed(config.run.seed)
    encoder = Encoder(config.encoder)
    trained = TrainedModel(
        module=encoder,
        tokenizer=None,
        source="trained by the recipe needle",
        licence="CC0-1.0",
        recipe="needle",
        data=f"generated texts of {config.num_tokens} tokens",
    )
    task = Task(
        module=encoder,
        loss=lambda: _loss(encoder, hide(config.run.batch_size, config.num_tokens, config.encoder)),
        evaluate=lambda: figures(encoder, config.num_tokens),
        save=lambda: checkpoint.save(trained, directory / CHECKPOINT),
    )
    return train(task, config.run, config.optimiser, directory)


def evaluate(trained: TrainedModel) -> dict[str, float]:
    """Return the figures for texts as long as the encoder takes."""
    return figures(trained.module, trained.module.config.max_source_len)


def reach(config: EncoderConfig) -> int:
    """Return from how many tokens away the windows of all layers together can bring something; 0 without windows."""
    window = config.stack.window
    if window is None:
        return 0
    side = window // 2 if config.stack.attention == "longformer" else window - 1
    return side * config.stack.num_layers


def hide(num_texts: int, num_tokens: int, config: EncoderConfig) -> Texts:
    """Draw texts of half to all of `num_tokens` with torch's global generator, each with one needle out of reach."""
    lengths = torch.randint(num_tokens // 2, num_tokens + 1, (num_texts,))
    token_ids = torch.randint(FIRST_NOISE, config.vocab_size, (num_texts, num_tokens))
    token_ids[:, 0] = QUERY
    nearest = reach(config) + 1
    places = nearest + (torch.rand(num_texts) * (lengths - nearest)).long()
    needles = torch.randint(NUM_NEEDLES, (num_texts,))
    token_ids[torch.arange(num_texts), places] = 1 + needles
    return Texts(token_ids, lengths, needles)


def logits(encoder: Encoder, token_ids: Tensor, lengths: Tensor) -> Tensor:
    """Return (B, N): how well what stands at the query's place matches the embedding of each needle."""
    is_global = token_ids == QUERY if encoder.config.stack.attention == "longformer" else None
    query = encoder(token_ids, lengths, is_global=is_global)[:, 0]
    return query @ encoder.token_embedding.weight[1:FIRST_NOISE].T


@torch.no_grad()
def figures(encoder: Encoder, num_tokens: int) -> dict[str, float]:
    """Return loss in nats and accuracy on texts of up to so many tokens, the same at every call."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(TEST_SEED)
        texts = hide(NUM_TEST_TEXTS, num_tokens, encoder.config)
    scores = torch.cat(
        [
            logits(encoder, token_ids, lengths)
            for token_ids, lengths in zip(texts.token_ids.split(32), texts.lengths.split(32), strict=True)
        ]
    )
    return {
        "validation_loss": F.cross_entropy(scores, texts.needles).item(),
        "accuracy": (scores.argmax(-1) == texts.needles).double().mean().item(),
    }


def _loss(encoder: Encoder, texts: Texts) -> Tensor:
    return F.cross_entropy(logits(encoder, texts.token_ids, texts.lengths), texts.needles)
