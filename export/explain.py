"""What an explain graph shows of each family: its inputs, its weights, and what their rows and columns stand for.

The graph is end to end and keeps nothing: one input of exact length in, the weights of every layer and head out. It is
traced from the models' own `attention_weights`, in fp32 whatever the precision of the bundle.

Shapes: T tokens, S places of the source, H heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from attendant.bundle import SOURCE, TOKENS, Axis, DType, Explain, Places, Role, TensorSpec, WeightsSpec
from models.captioner import Captioner
from models.decoder import Decoder
from models.encoder import Encoder, StackConfig
from models.encoder_decoder import SourceToSequence
from models.hard_vision import HardVision
from models.recurrent import Recurrent
from models.vision import ImageEncoderConfig, VisionTransformer

_SCORES = {
    "additive": "additive",
    "concat": "additive",
    "dot": "multiplicative",
    "scaled": "multiplicative",
    "general": "multiplicative",
}
_SHOWN_ATTENTION = ("softmax", "mean")  # linear attention computes no weights, Longformer's cannot be traced


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What is to be exported: inputs in the order of `forward`, which returns one tensor for each of the weights.

    The tensors are [1, H, rows, columns]. `lengths` are the most tokens of each input that has an axis of tokens.
    """

    inputs: tuple[TensorSpec, ...]
    weights: tuple[WeightsSpec, ...]
    forward: Callable[..., Sequence[Tensor]]
    lengths: dict[Role, int]
    vocabulary: dict[Role, int]
    grid: tuple[int, int] | None = None
    class_token: bool = False

    @property
    def explain(self) -> Explain:
        """What the manifest says of the weights."""
        return Explain(weights=self.weights, grid=self.grid, class_token=self.class_token)


def shown_of(module: nn.Module, max_model_len: int) -> Shown | None:
    """Describe what can be shown of a model that is served with so many tokens; None if it computes no weights."""
    if isinstance(module, Decoder):
        return _decoder(module, max_model_len)
    if isinstance(module, VisionTransformer):
        return _vision(module)
    if isinstance(module, HardVision):
        return _hard_vision(module)
    if isinstance(module, Recurrent):
        return _recurrent(module, max_model_len)
    if isinstance(module, SourceToSequence):
        return _source_to_sequence(module, max_model_len)
    encoder = module if isinstance(module, Encoder) else getattr(module, "encoder", None)  # of one with a head
    return _encoder(encoder, max_model_len) if isinstance(encoder, Encoder) else None


def _decoder(module: Decoder, max_model_len: int) -> Shown | None:
    config = module.config
    if config.attention not in _SHOWN_ATTENTION:
        return None
    return Shown(
        inputs=(_tokens(),),
        weights=_layers("self", "self-attention", config.num_layers, Places.TOKENS, **_causal(config)),
        forward=lambda token_ids: module.attention_weights(token_ids)[0],
        lengths={Role.TOKEN_IDS: max_model_len},
        vocabulary={Role.TOKEN_IDS: config.vocab_size},
    )


def _encoder(module: Encoder, max_model_len: int) -> Shown | None:
    config = module.config
    if config.stack.attention not in _SHOWN_ATTENTION:
        return None
    return Shown(
        inputs=(_tokens(),),
        weights=_layers("self", "self-attention", config.stack.num_layers, Places.TOKENS, **_near(config.stack)),
        forward=module.attention_weights,
        lengths={Role.TOKEN_IDS: max_model_len},
        vocabulary={Role.TOKEN_IDS: config.vocab_size},
    )


def _vision(module: VisionTransformer) -> Shown | None:
    config = module.config.encoder
    if config.stack.attention not in _SHOWN_ATTENTION:
        return None
    return Shown(
        inputs=(_image(config.num_channels, config.height, config.width),),
        weights=_layers("self", "self-attention", config.stack.num_layers, Places.PATCHES, **_near(config.stack)),
        forward=module.attention_weights,
        lengths={},
        vocabulary={},
        grid=_grid(config),
        class_token=True,
    )


def _hard_vision(module: HardVision) -> Shown:
    config, patch = module.config, module.config.patch.encoder
    where = WeightsSpec(
        output=f"{config.attention}.0",
        kind=config.attention,
        layer=0,
        title=f"where to look, {config.attention} attention",
        rows=Places.GLANCE,
        columns=Places.PATCHES,
    )
    return Shown(
        inputs=(_image(patch.num_channels, config.rows * patch.height, config.columns * patch.width),),
        weights=(where,),
        forward=lambda image: (module.attention_weights(image)[:, None, None],),
        lengths={},
        vocabulary={},
        grid=(config.rows, config.columns),
    )


def _recurrent(module: Recurrent, max_model_len: int) -> Shown:
    config = module.config
    kind = _SCORES.get(config.attention, config.attention)
    return Shown(
        # The decoder's steps are laid out one after the other: as many as there are.
        inputs=(_source(), _tokens(max_model_len)),
        weights=_layers(kind, f"{kind} attention of each token written", 1, Places.WRITTEN, columns=Places.SOURCE),
        forward=lambda source_ids, token_ids: module.attention_weights(source_ids, token_ids).cross,
        lengths={Role.SOURCE_IDS: config.max_source_len, Role.TOKEN_IDS: max_model_len},
        vocabulary={Role.SOURCE_IDS: config.source_vocab_size, Role.TOKEN_IDS: config.vocab_size},
    )


def _source_to_sequence(module: SourceToSequence, max_model_len: int) -> Shown | None:
    config, decoder = module.config.encoder, module.config.decoder
    is_image = isinstance(module, Captioner)
    places = Places.PATCHES if is_image else Places.SOURCE
    if decoder.attention not in _SHOWN_ATTENTION:
        return None
    shows_encoder = config.stack.attention in _SHOWN_ATTENTION
    weights: tuple[WeightsSpec, ...] = ()
    if shows_encoder:
        layers = config.stack.num_layers
        weights += _layers("encoder", "encoder self-attention", layers, places, **_near(config.stack))
    layers = decoder.num_layers
    weights += _layers("decoder", "decoder self-attention", layers, Places.TOKENS, **_causal(decoder))
    weights += _layers("cross", "cross-attention of each token written", layers, Places.WRITTEN, columns=places)

    def forward(source: Tensor, token_ids: Tensor) -> list[Tensor]:
        encoder = module.encoder.attention_weights(source) if shows_encoder else []
        written, cross = module.decoder.attention_weights(token_ids, memory=module.encode(source))
        return [*encoder, *written, *cross]

    lengths, vocabulary = {Role.TOKEN_IDS: max_model_len}, {Role.TOKEN_IDS: decoder.vocab_size}
    if not is_image:
        lengths[Role.SOURCE_IDS], vocabulary[Role.SOURCE_IDS] = config.max_source_len, config.vocab_size
    source = _image(config.num_channels, config.height, config.width) if is_image else _source()
    return Shown(
        inputs=(source, _tokens()),
        weights=weights,
        forward=forward,
        lengths=lengths,
        vocabulary=vocabulary,
        grid=_grid(config) if is_image else None,
    )


def _layers(
    kind: str, title: str, num_layers: int, rows: Places, columns: Places | None = None, **reach: int | None
) -> tuple[WeightsSpec, ...]:
    return tuple(
        WeightsSpec(
            output=f"{kind}.{layer}",
            kind=kind,
            layer=layer,
            title=f"{title}, layer {layer}",
            rows=rows,
            columns=columns or rows,
            **reach,
        )
        for layer in range(num_layers)
    )


def _causal(config: Any) -> dict[str, int | None]:
    return {"left": None if config.window is None else config.window - 1, "right": 0}


def _near(config: StackConfig) -> dict[str, int | None]:
    reach = None if config.window is None else config.window - 1
    return {"left": reach, "right": reach}


def _grid(config: ImageEncoderConfig) -> tuple[int, int]:
    return config.height // config.patch_size, config.width // config.patch_size


def _tokens(axis: Axis = TOKENS) -> TensorSpec:
    return TensorSpec(name="token_ids", role=Role.TOKEN_IDS, dtype=DType.INT64, axes=(1, axis))


def _source() -> TensorSpec:
    return TensorSpec(name="source_ids", role=Role.SOURCE_IDS, dtype=DType.INT64, axes=(1, SOURCE))


def _image(*axes: int) -> TensorSpec:
    return TensorSpec(name="image", role=Role.IMAGE, dtype=DType.FLOAT32, axes=(1, *axes))
