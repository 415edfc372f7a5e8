"""Recipe `sequences`: an encoder-decoder that copies, reverses or sorts letters, so that attention can be checked.

It is known where each letter of the target stands in the source; attention that works looks there. Sequences are drawn
anew for every batch, and judged at the lengths that were trained and at longer ones.

Shapes: B sequences, S source tokens, T target tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from models import checkpoint
from models.beam import BeamSearch, search
from models.checkpoint import TrainedModel
from models.checks import check_choices, check_integers
from models.config import ConfigError, from_file
from models.decoder_config import Attention, DecoderConfig, Positions
from models.encoder import EncoderConfig, StackConfig
from models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from models.training.characters import character_tokenizer, tokenizer_info
from models.training.config import OptimiserConfig, RunConfig
from models.training.loop import CHECKPOINT, Task, train
from models.training.pairs import END, SPECIAL_TOKENS, START, Pair, collate, mean_loss, pad, pair_loss

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(LETTERS)
_EVALUATION_SEED = 1 << 20
_EVALUATION_SEQUENCES = 256

Order = Literal["copy", "reverse", "sort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and choices of both sides; `window` and `attention` are those of self-attention."""

    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    attention: Attention = "softmax"
    positions: Positions = "sinusoidal"
    window: int | None = None
    num_features: int = 64

    def encoder_decoder(self, longest: int) -> EncoderDecoderConfig:
        """Return the configuration for sequences of at most `longest` letters."""
        absolute = self.positions if self.positions in ("learned", "sinusoidal") else "none"
        stack = StackConfig(
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            d_ff=self.d_ff,
            positions="none" if absolute == self.positions else self.positions,
            attention=self.attention,
            window=self.window,
            num_features=self.num_features,
        )
        encoder = EncoderConfig(
            vocab_size=VOCAB_SIZE, max_source_len=longest + 1, positions=absolute, scale_embeddings=True, stack=stack
        )
        decoder = DecoderConfig(
            vocab_size=VOCAB_SIZE,
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.d_model // self.num_heads,
            d_ff=self.d_ff,
            max_model_len=longest + 1,
            positions=self.positions,
            norm="layer",
            norm_eps=1e-5,
            activation="gelu",
            bias="all",
            tie_embeddings=False,
            attention=self.attention,
            window=self.window,
            num_features=self.num_features,
            scale_embeddings=True,
        )
        return EncoderDecoderConfig(encoder=encoder, decoder=decoder)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencesConfig:
    """The recipe. Lengths up to `max_length` are trained; those above it, up to `max_longer_length`, only judged."""

    run: RunConfig
    optimiser: OptimiserConfig
    order: Order
    max_length: int
    max_longer_length: int
    model: ModelConfig

    def __post_init__(self) -> None:
        check_choices(self, order=get_args(Order))
        check_integers(self, 1, "max_length")
        if self.max_longer_length <= self.max_length:
            raise ConfigError(f"max_longer_length is {self.max_longer_length}; max_length is {self.max_length} already")
        if self.order == "sort" and self.max_longer_length > len(LETTERS):
            raise ConfigError(f"max_longer_length is {self.max_longer_length}; only {len(LETTERS)} letters differ")


CONFIG = SequencesConfig


def run(config: SequencesConfig, directory: Path) -> dict[str, float]:
    """Train in `directory`, continuing what is there; the checkpoint is its subdirectory `checkpoint`.

    Returns the figures of the last evaluation, those of `judge`.
    """
    torch.manual_seed(config.run.seed)
    model = EncoderDecoder(config.model.encoder_decoder(config.max_longer_length))
    tokenizer = tokenizer_info(character_tokenizer(LETTERS))
    trained = TrainedModel(
        module=model,
        tokenizer=tokenizer,
        source_tokenizer=tokenizer,
        source="trained by the recipe sequences",
        licence="Apache-2.0",
        recipe=f"sequences-{config.order}",
        data="random letters",
    )
    task = Task(
        module=model,
        loss=lambda: pair_loss(model, collate(draw(config.order, config.run.batch_size, (1, config.max_length)))),
        evaluate=lambda: judge(model, config.order, config.max_length),
        save=lambda: checkpoint.save(trained, directory / CHECKPOINT),
    )
    return train(task, config.run, config.optimiser, directory)


def evaluate(trained: TrainedModel) -> dict[str, float]:
    """Return the figures of `judge`, lengths being those of the recipe's own configuration."""
    order = trained.recipe.partition("-")[2]
    path = Path(__file__).with_name(f"sequences_{order}.toml")
    config = from_file(SequencesConfig, path)
    return judge(trained.module, config.order, config.max_length)


def draw(order: Order, count: int, lengths: tuple[int, int], generator: torch.Generator | None = None) -> list[Pair]:
    """Draw pairs of between lengths[0] and lengths[1] letters; letters to be sorted differ, so each has one place."""
    low, high = lengths
    if order == "sort":
        letters = torch.rand(count, len(LETTERS), generator=generator).argsort(1)[:, :high]
    else:
        letters = torch.randint(len(LETTERS), (count, high), generator=generator)
    rows = (letters + len(SPECIAL_TOKENS)).tolist()
    cuts = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    sources = [tuple(row[:cut]) for row, cut in zip(rows, cuts, strict=True)]
    return [Pair(source=source, target=rearranged(order, source)) for source in sources]


def rearranged(order: Order, source: Sequence[int]) -> tuple[int, ...]:
    """Return the target of a source."""
    if order == "copy":
        return tuple(source)
    return tuple(reversed(source)) if order == "reverse" else tuple(sorted(source))


def places(order: Order, source: Sequence[int]) -> Tensor:
    """Return where each letter of the target stands, (T, S) booleans: a permutation."""
    diagonal = torch.eye(len(source), dtype=torch.bool)
    if order == "sort":
        return diagonal[torch.tensor(source).argsort()]
    return diagonal if order == "copy" else diagonal.flip(0)


@torch.no_grad()
def judge(model: EncoderDecoder, order: Order, max_length: int) -> dict[str, float]:
    """Return nats per token, shares of exactly right targets, and how often attention looks at the right place.

    A target counts as right if greedy decoding gives it from its first letter to its end. "longer" is what was not
    trained: lengths above `max_length`, up to what the model has room for.
    """
    generator = torch.Generator().manual_seed(_EVALUATION_SEED)
    limit = model.config.encoder.max_source_len - 1
    pairs = draw(order, _EVALUATION_SEQUENCES, (1, max_length), generator)
    longer = draw(order, _EVALUATION_SEQUENCES, (max_length + 1, limit), generator)
    return {
        "validation_loss": mean_loss(model, pairs, _EVALUATION_SEQUENCES),
        "exact": exact(model, pairs),
        "longer_exact": exact(model, longer),
        "aligned": aligned(model, order, pairs),
    }


def exact(model: EncoderDecoder, pairs: Sequence[Pair]) -> float:
    """Return the share of pairs whose target is decoded without a mistake."""
    source, source_lengths = pad([pair.source for pair in pairs])
    options = BeamSearch(
        width=1, max_tokens=model.config.decoder.max_model_len, start_token_id=START, end_token_id=END
    )  # fmt: skip
    found = search(model, source, source_lengths, options)
    right = [best.token_ids == pair.target for (best, *_), pair in zip(found, pairs, strict=True)]
    return sum(right) / len(right)


def aligned(model: EncoderDecoder, order: Order, pairs: Sequence[Pair]) -> float:
    """Return how often the last layer's cross-attention, its heads averaged, is highest where the next letter stands.

    Where two places are highest, as with a mean, it looks at neither.
    """
    batch = collate(pairs)
    weights = model.cross_attention_weights(batch.source, batch.inputs, batch.source_lengths)[-1].mean(1)  # (B, T, S)
    hits = []
    for row, pair in zip(weights, pairs, strict=True):
        size = len(pair.source)
        highest = row[:size, :size] == row[:size, :size].amax(-1, keepdim=True)
        hits.append((highest.sum(-1) == 1) & (highest & places(order, pair.source)).any(-1))
    return torch.cat(hits).double().mean().item()
