"""What `python -m models show` tells of a checkpoint: its configuration and, for an example, where it looks.

A family of models is shown by its function in `_SHOWN`, which runs the model on an example and names what attends to
what.

Shapes: B rows, always one; H heads, T queries, S keys.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from attendant.heatmap import AttentionMap, Layer, Sheet
from models.attention.functional import allow
from models.captioner import Captioner
from models.checkpoint import TrainedModel
from models.classifier import ClassifierConfig
from models.encoder import StackConfig
from models.examples import Example, patch_names, picture, read, target_ids
from models.families import family_of
from models.recurrent import Recurrent
from models.token_texts import token_texts
from models.vision import ImageEncoderConfig

MAX_CELLS = 10_000_000


def description(model: TrainedModel) -> Iterator[str]:
    """Yield the lines that describe a checkpoint: provenance, configuration, size, and states."""
    lines = [(name, getattr(model, name)) for name in ("source", "licence", "recipe", "data")]
    lines = [(name, value) for name, value in lines if value is not None]
    lines += _flat(asdict(model.module.config))
    lines.append(("parameters", f"{sum(parameter.numel() for parameter in model.module.parameters()):,}"))
    specs = model.module.state_specs()
    if specs:
        lines.append(("states", f"{sum(spec.bytes_per_token for spec in specs):,} bytes for each token"))
    width = max(len(name) for name, _ in lines) + 2
    for name, value in lines:
        yield f"{name:<{width}}{value}"
    for spec in specs:
        yield f"state {spec.name:<{width - 6}}{spec.rule:<8} {spec.dtype} {list(spec.shape)}"


@torch.inference_mode()
def attention(model: TrainedModel, example: Example) -> Sheet:
    """Return the attention weights of every layer and head on an example.

    Raises:
        ValueError: the model has no attention to show, or cannot read the example; the message says what to do.
    """
    family = family_of(model.module)
    if family not in _SHOWN:
        raise ValueError(f"attention of the family {family!r} cannot be shown; {', '.join(_SHOWN)} can")
    given = f"test picture {example.image}" if example.text is None else example.text
    return Sheet(title=f"{model.recipe or family}: {given}", layers=tuple(_SHOWN[family](model, example)))


def only(sheet: Sheet, indices: Sequence[int]) -> Sheet:
    """Return a sheet with some of its layers, counted from 0.

    Raises:
        ValueError: there is no such layer.
    """
    for index in indices:
        if not 0 <= index < len(sheet.layers):
            raise ValueError(f"--layer is {index}; there are 0 to {len(sheet.layers) - 1}")
    return replace(sheet, layers=tuple(sheet.layers[index] for index in indices))


def _decoder(model: TrainedModel, example: Example) -> list[Layer]:
    example.only("text")
    token_ids, tokens = read(model.tokenizer, example.text)
    weights, _ = model.module.attention_weights(token_ids)
    return _layers("self-attention", weights, tokens, tokens, _causal(len(tokens), model.module.config.window))


def _encoder(model: TrainedModel, example: Example) -> list[Layer]:
    example.only("text")
    token_ids, tokens = read(model.tokenizer, example.text)
    config = model.module.config
    stack = (config.encoder if isinstance(config, ClassifierConfig) else config).stack
    if stack.attention != "longformer":
        return _layers(
            "self-attention", model.module.attention_weights(token_ids), tokens, tokens, _near(len(tokens), stack)
        )
    is_global = torch.arange(len(tokens)) == 0
    weights = model.module.attention_weights(token_ids, is_global=is_global[None])
    mask = _near(len(tokens), stack) | is_global | is_global[:, None]
    return _layers("self-attention with the first token global", weights, tokens, tokens, mask)


def _vision_transformer(model: TrainedModel, example: Example) -> list[Layer]:
    example.only("image")
    config = model.module.config.encoder
    weights = model.module.attention_weights(picture(example.image, config.height, config.width))
    names = ["class", *_patches(config)]
    return _layers("self-attention", weights, names, names, _near(len(names), config.stack))


def _hard_attention(model: TrainedModel, example: Example) -> list[Layer]:
    example.only("image")
    config, patch = model.module.config, model.module.config.patch.encoder
    image = picture(example.image, config.rows * patch.height, config.columns * patch.width)
    weights = model.module.attention_weights(image)[:, None, None]  # (1, 1, 1, S)
    return _layers("where to look", [weights], ["glance"], patch_names(config.rows, config.columns), None)


def _source_to_sequence(model: TrainedModel, example: Example) -> list[Layer]:
    config = model.module.config
    if isinstance(model.module, Captioner):
        example.only("image", "target")
        source, names = picture(example.image, config.encoder.height, config.encoder.width), _patches(config.encoder)
    else:
        example.only("text", "target")
        source, names = read(model.source_tokenizer or model.tokenizer, example.text)
    limit = (config if isinstance(model.module, Recurrent) else config.decoder).max_model_len
    target = target_ids(model, source, example.target, limit)
    start, end = model.tokenizer.bos_token_id, model.tokenizer.eos_token_ids[0]
    tokenizer = Tokenizer.from_str(model.tokenizer.json)
    # While it reads the start token it writes the first of the target, and so on.
    before, written = (token_texts(tokenizer, ids) for ids in ((start, *target), (*target, end)))
    weights = model.module.attention_weights(source, torch.tensor([[start, *target]]))
    layers = []
    if weights.encoder:
        mask = _near(len(names), config.encoder.stack)
        layers += _layers("encoder self-attention", weights.encoder, names, names, mask)
    if weights.decoder:
        mask = _causal(len(before), config.decoder.window)
        layers += _layers("decoder self-attention", weights.decoder, before, before, mask)
    return layers + _layers("cross-attention of each token written", weights.cross, written, names, None)


_SHOWN: dict[str, Callable[[TrainedModel, Example], list[Layer]]] = {
    "decoder": _decoder,
    "encoder": _encoder,
    "masked-lm": _encoder,
    "classifier": _encoder,
    "tagger": _encoder,
    "encoder-decoder": _source_to_sequence,
    "recurrent": _source_to_sequence,
    "vision-transformer": _vision_transformer,
    "hard-attention": _hard_attention,
    "captioner": _source_to_sequence,
}


def _causal(num_tokens: int, window: int | None) -> Tensor:
    positions = torch.arange(num_tokens)[None]
    return allow(positions, positions, causal=True, left=None if window is None else window - 1)[0, 0]


def _near(num_tokens: int, stack: StackConfig) -> Tensor:
    """Return the mask (S, S) of a bidirectional stack; global tokens are not in it."""
    positions = torch.arange(num_tokens)[None]
    reach = None
    if stack.window is not None:
        reach = stack.window // 2 if stack.attention == "longformer" else stack.window - 1
    return allow(positions, positions, left=reach, right=reach)[0, 0]


def _patches(config: ImageEncoderConfig) -> list[str]:
    return patch_names(config.height // config.patch_size, config.width // config.patch_size)


def _layers(
    name: str, weights: Sequence[Tensor], rows: Sequence[str], columns: Sequence[str], mask: Tensor | None
) -> list[Layer]:
    """Name the weights (1, H, T, S) of each layer; the mask is (T, S)."""
    if (cells := sum(layer.numel() for layer in weights)) > MAX_CELLS:
        raise ValueError(f"{name} has {cells:,} weights; at most {MAX_CELLS:,} are shown: give a shorter text")
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
