"""The architectures that a checkpoint can hold, by the name it gives them."""

from models.captioner import Captioner
from models.classifier import Classifier, Tagger
from models.decoder import Decoder
from models.encoder import Encoder
from models.encoder_decoder import EncoderDecoder
from models.hard_vision import HardVision
from models.masked_lm import MaskedLanguageModel
from models.model import Model
from models.recurrent import Recurrent
from models.vision import VisionTransformer

FAMILIES: dict[str, type[Model]] = {
    "decoder": Decoder,
    "encoder": Encoder,
    "encoder-decoder": EncoderDecoder,
    "recurrent": Recurrent,
    "masked-lm": MaskedLanguageModel,
    "classifier": Classifier,
    "tagger": Tagger,
    "vision-transformer": VisionTransformer,
    "hard-attention": HardVision,
    "captioner": Captioner,
}


def family_of(model: Model) -> str:
    """Return the name of a model's architecture."""
    return next(name for name, model_class in FAMILIES.items() if type(model) is model_class)
