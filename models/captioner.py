"""A captioner: an encoder reads the patches of an image, a decoder writes about it and attends to them.

Shapes: B rows, N patches, T tokens, E encoder width, V vocabulary. The attention to places of an image is that of Xu et
al., Show, Attend and Tell, 2015, arXiv:1502.03044, in a Transformer.
"""

from dataclasses import dataclass

from models.decoder import Decoder, DecoderConfig
from models.encoder_decoder import SourceToSequence
from models.vision import ImageEncoder, ImageEncoderConfig, xavier


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionerConfig:
    """Both sides; their widths may differ."""

    encoder: ImageEncoderConfig
    decoder: DecoderConfig


class Captioner(SourceToSequence):
    """Images (B, C, Y, X) and token ids in, logits of the next token out.

    Where images are padded at the bottom, `source_lengths` counts the real patches of each, in reading order.
    """

    config_class = CaptionerConfig

    def __init__(self, config: CaptionerConfig, *, dropout: float = 0.0):
        super().__init__(config)
        self.encoder = ImageEncoder(config.encoder, dropout=dropout)
        self.decoder = Decoder(config.decoder, d_memory=config.encoder.stack.d_model, dropout=dropout)
        xavier(self)
        self.tie()
