"""What `python -m models show` tells of a checkpoint: its configuration and, for an example, where it looks.

A family of models is shown by its function in `_SHOWN`, which runs the model on an example and names what attends to
what.

Shapes: B rows, always one; H heads, T queries, S keys.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from attendant.heatmap import AttentionMap, Layer, Sheet, render_png
from models.attention.functional import allow
from models.beam import BeamSearch, search
from models.checkpoint import TokenizerInfo, TrainedModel
from models.families import family_of
from models.recurrent import Recurrent
from models.token_texts import token_texts

MAX_WRITTEN = 64
"""How many tokens a model writes at most where it is given no target."""
BEAM_WIDTH = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What a model is given: a text to read, and the target that it writes about it; its own where that is None."""

    text: str
    target: str | None = None


def description(model: TrainedModel) -> Iterator[str]:
    """Yield the lines that describe a checkpoint: provenance, configuration, size, and states."""
    for name in ("source", "licence", "recipe", "data"):
        if (value := getattr(model, name)) is not None:
            yield f"{name:<16}{value}"
    for name, value in _flat(asdict(model.module.config)):
        yield f"{name:<16}{value}" if len(name) < 16 else f"{name} {value}"
    yield f"{'parameters':<16}{sum(parameter.numel() for parameter in model.module.parameters()):,}"
    specs = model.module.state_specs()
    for spec in specs:
        yield f"state {spec.name:<10}{spec.rule:<8} {spec.dtype} {list(spec.shape)}"
    yield f"{'states':<16}{sum(spec.bytes_per_token for spec in specs):,} bytes for each token"


@torch.inference_mode()
def attention(model: TrainedModel, example: Example) -> Sheet:
    """Return the attention weights of every layer and head on an example.

    Raises:
        ValueError: the model has no attention to show, or cannot read the example; the message says what to do.
    """
    family = family_of(model.module)
    if family not in _SHOWN:
        raise ValueError(f"attention of the family {family!r} cannot be shown; {', '.join(_SHOWN)} can")
    return Sheet(title=f"{model.recipe or family}: {example.text}", layers=tuple(_SHOWN[family](model, example)))


def write_pngs(sheet: Sheet, directory: Path) -> list[Path]:
    """Write one picture for each layer into a directory, which is made if need be, and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, layer in enumerate(sheet.layers):
        name = re.sub(r"\W+", "-", layer.title.lower()).strip("-")
        paths.append(directory / f"{index:02d}-{name}.png")
        paths[-1].write_bytes(render_png(layer))
    return paths


def _decoder(model: TrainedModel, example: Example) -> list[Layer]:
    if example.target is not None:
        raise ValueError("a decoder continues what it reads; give all of it as --text, and no --target")
    token_ids, tokens = _read(model.tokenizer, example.text)
    weights, _ = model.module.attention_weights(token_ids)
    return _layers("self-attention", weights, tokens, tokens, _causal(len(tokens), model.module.config.window))


def _encoder(model: TrainedModel, example: Example) -> list[Layer]:
    if example.target is not None:
        raise ValueError("an encoder writes nothing; give a --text, and no --target")
    token_ids, tokens = _read(model.tokenizer, example.text)
    weights = model.module.attention_weights(token_ids)
    return _layers("self-attention", weights, tokens, tokens, _near(len(tokens), model.module.config.stack.window))


def _source_to_sequence(model: TrainedModel, example: Example) -> list[Layer]:
    source_ids, source = _read(model.source_tokenizer or model.tokenizer, example.text)
    target_ids = _target(model, source_ids, example.target)
    start, end = model.tokenizer.bos_token_id, model.tokenizer.eos_token_ids[0]
    tokenizer = Tokenizer.from_str(model.tokenizer.json)
    # While it reads the start token it writes the first of the target, and so on.
    read, written = (token_texts(tokenizer, ids) for ids in ((start, *target_ids), (*target_ids, end)))
    weights = model.module.attention_weights(source_ids, torch.tensor([[start, *target_ids]]))
    config = model.module.config
    layers = []
    if weights.encoder:
        near = _near(len(source), config.encoder.stack.window)
        layers += _layers("encoder self-attention", weights.encoder, source, source, near)
    if weights.decoder:
        causal = _causal(len(read), config.decoder.window)
        layers += _layers("decoder self-attention", weights.decoder, read, read, causal)
    return layers + _layers("cross-attention of each token written", weights.cross, written, source, None)


_SHOWN: dict[str, Callable[[TrainedModel, Example], list[Layer]]] = {
    "decoder": _decoder,
    "encoder": _encoder,
    "masked-lm": _encoder,
    "encoder-decoder": _source_to_sequence,
    "recurrent": _source_to_sequence,
}


def _read(info: TokenizerInfo | None, text: str) -> tuple[Tensor, list[str]]:
    """Return the token ids (1, S) of a text and the text of each token."""
    if info is None:
        raise ValueError("the checkpoint has no tokenizer, so no --text can be read")
    tokenizer = Tokenizer.from_str(info.json)
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    if info.add_bos:
        token_ids = [info.bos_token_id, *token_ids]
    if not token_ids:
        raise ValueError(f"the text {text!r} has no tokens; give a longer one")
    return torch.tensor([token_ids]), token_texts(tokenizer, token_ids)


def _target(model: TrainedModel, source_ids: Tensor, target: str | None) -> Sequence[int]:
    """Return the token ids of a target or, where it is None, of the best that a beam search finds."""
    if target is not None:
        token_ids, _ = _read(model.tokenizer, target)
        return token_ids[0].tolist()
    config = model.module.config
    limit = (config if isinstance(model.module, Recurrent) else config.decoder).max_model_len
    options = BeamSearch(
        width=BEAM_WIDTH,
        max_tokens=max(1, min(MAX_WRITTEN, limit - 1)),  # read again after a start token
        start_token_id=model.tokenizer.bos_token_id,
        end_token_id=model.tokenizer.eos_token_ids[0],
    )
    return search(model.module, source_ids, None, options)[0][0].token_ids


def _causal(num_tokens: int, window: int | None) -> Tensor:
    positions = torch.arange(num_tokens)[None]
    return allow(positions, positions, causal=True, left=None if window is None else window - 1)[0, 0]


def _near(num_tokens: int, window: int | None) -> Tensor:
    positions, reach = torch.arange(num_tokens)[None], None if window is None else window - 1
    return allow(positions, positions, left=reach, right=reach)[0, 0]


def _layers(
    name: str, weights: Sequence[Tensor], rows: Sequence[str], columns: Sequence[str], mask: Tensor | None
) -> list[Layer]:
    """Name the weights (1, H, T, S) of each layer; the mask is (T, S)."""
    return [
        Layer(
            title=f"{name}, layer {index}",
            heads=tuple(
                AttentionMap.of(head.double(), rows=rows, columns=columns, mask=mask, title=f"head {place}")
                for place, head in enumerate(layer[0])
            ),
        )
        for index, layer in enumerate(weights)
    ]


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
