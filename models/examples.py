"""What a checkpoint is shown: texts and test pictures as tensors, with names for the tokens and patches in them.

Shapes: B rows, always one; S tokens, C channels, Y image height, X image width.
"""

from dataclasses import dataclass
from io import BytesIO
from string import ascii_uppercase

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Generator, Tensor

from models.beam import BeamSearch, search
from models.checkpoint import TokenizerInfo, TrainedModel
from models.token_texts import token_texts
from models.training.digits import cluttered, read_digits, scenes

NUM_PICTURES = 1000
PICTURES = {"digit": (8, 8), "scene": (16, 16), "clutter": (24, 24)}
"""Height and width of the pictures that the recipes with digits are judged on."""
BEAM_WIDTH = 5
MAX_WRITTEN = 64
"""How many tokens a model writes at most where it is given no target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What a model is given: a text to read or the index of a test picture, and the target that it writes about it.

    The target is the model's own where it is None.
    """

    text: str | None = None
    image: int | None = None
    target: str | None = None

    def only(self, *names: str) -> None:
        """Refuse what a model does not take, and the lack of what it does: the first name.

        Raises:
            ValueError: something is surplus or missing; the message names the option.
        """
        if getattr(self, names[0]) is None:
            raise ValueError(f"--{names[0]} is missing; this model reads {names[0]}s")
        for name in ("text", "image", "target"):
            if name not in names and getattr(self, name) is not None:
                raise ValueError(f"--{name} is given; this model takes --{' and --'.join(names)}")


def read(info: TokenizerInfo | None, text: str) -> tuple[Tensor, list[str]]:
    """Return the token ids (1, S) of a text and the text of each; without a tokenizer, ids are read as numbers.

    Raises:
        ValueError: the text has no tokens, or is not of numbers where it must be.
    """
    if info is None:
        try:
            token_ids, tokens = [int(word) for word in text.split()], text.split()
        except ValueError as error:
            raise ValueError("the checkpoint has no tokenizer; give token ids, such as --text '0 17 3'") from error
    else:
        tokenizer = Tokenizer.from_str(info.json)
        token_ids = tokenizer.encode(text, add_special_tokens=False).ids
        if info.add_bos:
            token_ids = [info.bos_token_id, *token_ids]
        tokens = token_texts(tokenizer, token_ids)
    if not token_ids:
        raise ValueError(f"the text {text!r} has no tokens; give a longer one")
    return torch.tensor([token_ids]), tokens


def picture(index: int, height: int, width: int) -> Tensor:
    """Return picture `index` of those that the recipes with digits are judged on: (1, 1, Y, X) of the given size.

    A single cell is a digit, two by two are the scenes of captions, any other grid has one digit in clutter.

    Raises:
        ValueError: there are not so many pictures.
    """
    digits = read_digits("test")
    size = digits.images.shape[-1]
    grid = (height // size, width // size)
    generator = Generator().manual_seed(0)
    if grid == (1, 1):
        images = digits.images
    elif grid == (2, 2):
        images = scenes(digits, NUM_PICTURES, generator).images
    else:
        images = cluttered(digits, NUM_PICTURES, grid, generator).images
    if not 0 <= index < len(images):
        raise ValueError(f"there is no test picture {index}; they are numbered from 0 to {len(images) - 1}")
    return images[index : index + 1]


def png(image: Tensor) -> bytes:
    """Return a grey picture (1, 1, Y, X) of values from 0, written black, to 1 as a PNG file of 8 bits a pixel."""
    file = BytesIO()
    Image.fromarray((image[0, 0] * 255).round().to(torch.uint8).numpy()).save(file, "PNG")
    return file.getvalue()


def patch_names(rows: int, columns: int) -> list[str]:
    """Return the names of patches in reading order, as those of cells in a spreadsheet: A1, B1, ..., A2, ...

    A grid of more columns than letters has "row,column", counted from 1.
    """
    if columns > len(ascii_uppercase):
        return [f"{row + 1},{column + 1}" for row in range(rows) for column in range(columns)]
    return [f"{letter}{row + 1}" for row in range(rows) for letter in ascii_uppercase[:columns]]


def target_ids(model: TrainedModel, source: Tensor, target: str | None, max_model_len: int) -> list[int]:
    """Return the token ids of a target or, where it is None, of the best that a beam search finds for the source."""
    if target is not None:
        return Tokenizer.from_str(model.tokenizer.json).encode(target, add_special_tokens=False).ids
    options = BeamSearch(
        width=BEAM_WIDTH,
        max_tokens=max(1, min(MAX_WRITTEN, max_model_len - 1)),  # they are read again after a start token
        start_token_id=model.tokenizer.bos_token_id,
        end_token_id=model.tokenizer.eos_token_ids[0],
    )
    return list(search(model.module, source, None, options)[0][0].token_ids)
