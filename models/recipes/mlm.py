"""Recipe `mlm`: an encoder that learns to say what stands at hidden places of a text.

It is judged by how often it is right, beside counting what stood between the same neighbours and, with
`objective = "causal"`, a decoder of the same size that knows what precedes each place, and nothing after it.

Shapes: B windows, T tokens, V vocabulary.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from models import checkpoint
from models.checkpoint import TrainedModel
from models.checks import check_choices, check_integers, check_shares
from models.config import ConfigError, from_file
from models.decoder import Decoder, DecoderConfig
from models.encoder import EncoderConfig
from models.masked_lm import MaskedLanguageModel
from models.training.baselines import two_sided_guesses
from models.training.config import OptimiserConfig, RunConfig
from models.training.loop import CHECKPOINT, Task, train
from models.training.masking import mask_tokens, select
from models.training.text import (
    END_OF_TEXT,
    TextConfig,
    encode_stream,
    random_windows,
    tokenizer_info,
    train_tokenizer,
)

MASK = "<|mask|>"
BASELINE = "baseline.json"
_EVALUATION_BATCH = 64
_EVALUATION_SEED = 0

Objective = Literal["masked", "causal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MlmConfig:
    """The recipe. Windows are `encoder.max_source_len` tokens long; `encoder.vocab_size` counts the mask token too.

    A model is judged on the first `evaluation_windows` of the validation text.
    """

    run: RunConfig
    optimiser: OptimiserConfig
    text: TextConfig
    encoder: EncoderConfig
    evaluation_windows: int
    objective: Objective = "masked"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self, objective=get_args(Objective))
        check_integers(self, 1, "evaluation_windows")
        check_shares(self, "dropout")


CONFIG = MlmConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """What is asked: windows (B, T) of tokens, and booleans (B, T) that are True where the token is to be told."""

    windows: Tensor
    selected: Tensor
    mask_token_id: int

    @property
    def hidden(self) -> Tensor:
        """The windows with the mask token at all places that are asked."""
        return self.windows.masked_fill(self.selected, self.mask_token_id)


def run(config: MlmConfig, directory: Path) -> dict[str, float]:
    """Train in `directory`, continuing what is there; the checkpoint is its subdirectory `checkpoint`.

    Returns the figures of the last evaluation: nats, and share of right answers, at hidden places of validation text.

    Raises:
        ConfigError: the text is too small for the configuration.
        FileNotFoundError: the text is not there.
    """
    training, held_out = config.text.split()
    tokenizer = _tokenizer(training, config.encoder.vocab_size, directory / "tokenizer.json")
    stream, window = encode_stream(tokenizer, training), config.encoder.max_source_len
    places, ordinary_ids = _places(config, tokenizer, held_out), _ordinary_ids(tokenizer)
    counted = two_sided_guesses(stream, places.hidden, config.encoder.vocab_size)
    baseline = {"two_sided_accuracy": _accuracy(counted[places.selected], places)}
    (directory / BASELINE).write_text(json.dumps(baseline, indent=2) + "\n", encoding="utf-8")
    print(f"baseline: two-sided 5-grams {baseline['two_sided_accuracy']:.4f}")
    torch.manual_seed(config.run.seed)
    if config.objective == "masked":
        model = MaskedLanguageModel(config.encoder, dropout=config.dropout)
    else:
        model = Decoder(causal_config(config.encoder), dropout=config.dropout)

    def loss() -> Tensor:
        inputs, targets = random_windows(stream, config.run.batch_size, window)
        if isinstance(model, Decoder):
            return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        masked = mask_tokens(inputs, places.mask_token_id, ordinary_ids)
        logits = model.head(model.encoder(masked.inputs)[masked.selected])
        return F.cross_entropy(logits, inputs[masked.selected])

    trained = _trained(model, tokenizer, config.text)
    task = Task(
        module=model,
        loss=loss,
        evaluate=lambda: _judge(model, places),
        save=lambda: checkpoint.save(trained, directory / CHECKPOINT),
    )
    return train(task, config.run, config.optimiser, directory)


@torch.no_grad()
def evaluate(trained: TrainedModel) -> dict[str, float]:
    """Return nats and share of right answers at hidden places of the recipe's own validation text."""
    config = from_file(MlmConfig, Path(__file__).with_suffix(".toml"))
    tokenizer = Tokenizer.from_str(trained.tokenizer.json)
    return _judge(trained.module, _places(config, tokenizer, config.text.split()[1]))


def causal_config(encoder: EncoderConfig) -> DecoderConfig:
    """Return the decoder of the same sizes and choices as an encoder."""
    stack = encoder.stack
    return DecoderConfig(
        vocab_size=encoder.vocab_size,
        d_model=stack.d_model,
        num_layers=stack.num_layers,
        num_heads=stack.num_heads,
        num_kv_heads=stack.num_heads,
        head_dim=stack.d_model // stack.num_heads,
        d_ff=stack.d_ff,
        max_model_len=encoder.max_source_len,
        positions=encoder.positions if stack.positions == "none" else stack.positions,
        norm=stack.norm,
        norm_eps=stack.norm_eps,
        activation=stack.activation,
        bias="all" if stack.bias else "none",
        tie_embeddings=True,
        attention=stack.attention,
        norm_first=stack.norm_first,
    )


def _tokenizer(documents: list[str], vocab_size: int, path: Path) -> Tokenizer:
    """Return the tokenizer that `path` holds, learnt from the documents the first time; the mask token is its last."""
    if not path.is_file():
        tokenizer = train_tokenizer(documents, vocab_size - 1)
        tokenizer.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])
        tokenizer.save(str(path))
    return Tokenizer.from_file(str(path))


def _ordinary_ids(tokenizer: Tokenizer) -> Tensor:
    special = {tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(MASK)}
    return torch.tensor([token_id for token_id in range(tokenizer.get_vocab_size()) if token_id not in special])


def _places(config: MlmConfig, tokenizer: Tokenizer, held_out: list[str]) -> Places:
    """Cut windows from the validation text and choose what is asked, the same in every evaluation.

    The first token of a window is never asked: a decoder has no say in it.
    """
    window = config.encoder.max_source_len
    stream = encode_stream(tokenizer, held_out)
    windows = stream[: len(stream) // window * window].unflatten(0, (-1, window))[: config.evaluation_windows]
    if len(windows) < config.evaluation_windows:
        raise ConfigError(f"evaluation_windows is {config.evaluation_windows}; the text has {len(windows)}")
    selected = select(windows, _ordinary_ids(tokenizer), torch.Generator().manual_seed(_EVALUATION_SEED))
    selected[:, 0] = False
    return Places(windows=windows, selected=selected, mask_token_id=tokenizer.token_to_id(MASK))


def _judge(model: MaskedLanguageModel | Decoder, places: Places) -> dict[str, float]:
    logits = []
    for windows, hidden, selected in zip(
        *(x.split(_EVALUATION_BATCH) for x in (places.windows, places.hidden, places.selected)), strict=True
    ):
        if isinstance(model, Decoder):
            logits.append(model(windows)[:, :-1][selected[:, 1:]])
        else:
            logits.append(model.head(model.encoder(hidden)[selected]))
    told = torch.cat(logits)
    loss = F.cross_entropy(told, places.windows[places.selected]).item()
    return {"validation_loss": loss, "masked_accuracy": _accuracy(told.argmax(-1), places)}


def _accuracy(guesses: Tensor, places: Places) -> float:
    return (guesses == places.windows[places.selected]).double().mean().item()


def _trained(model: MaskedLanguageModel | Decoder, tokenizer: Tokenizer, text: TextConfig) -> TrainedModel:
    return TrainedModel(
        module=model,
        tokenizer=replace(tokenizer_info(tokenizer), mask_token_id=tokenizer.token_to_id(MASK)),
        source="trained by the recipe mlm",
        licence=text.licence,
        recipe="mlm",
        data=text.source,
    )
