"""Images as requests bring them to arrays as models take them: [channels, height, width], normalised."""

import math
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from attendant.bundle import ImageInput
from attendant.v1 import image_pb2 as pb
from service.errors import InvalidField

MAX_PIXELS = 1 << 24  # of a file that is to be resized; any other is decoded only if it has the model's own size

Array = NDArray[np.float32]

# Sizes are compared here before anything is decoded; Pillow's own guard would print warnings of smaller ones.
Image.MAX_IMAGE_PIXELS = None


def read_image(field: str, image: pb.Image, expected: ImageInput, *, resize: bool = False) -> Array:
    """Return an image as the model takes it, float32 [channels, height, width].

    Args:
        field: what it is called in errors.
        image: a PNG or JPEG file, or values from 0 to 1.
        expected: what the model takes.
        resize: bring a file of another size to the model's own, averaging over areas.

    Raises:
        InvalidField: it is empty, no such file, damaged, of another size, or not finite.
    """
    kind = image.WhichOneof("image")
    if kind is None:
        raise InvalidField(f"{field}.image", kind, "one of encoded, tensor is needed")
    if kind == "encoded":
        return read_file(f"{field}.encoded", image.encoded, expected, resize=resize)
    return _normalised(_values(f"{field}.tensor", image.tensor, expected), expected)


def read_file(field: str, content: bytes, expected: ImageInput, *, resize: bool = False) -> Array:
    """Return the image in a PNG or JPEG file; see `read_image`."""
    return _normalised(_decode(field, content, expected, resize), expected)


def _normalised(values: Array, expected: ImageInput) -> Array:
    mean, std = (np.array(each, np.float32)[:, None, None] for each in (expected.mean, expected.std))
    return (values - mean) / std


def _values(field: str, tensor: pb.ImageTensor, expected: ImageInput) -> Array:
    wanted = (expected.channels, expected.height, expected.width)
    shape = tuple(tensor.shape)
    if shape != wanted and (expected.channels, *shape) != (1, *wanted[1:]):
        raise InvalidField(f"{field}.shape", list(shape), f"must be {list(wanted)}: channels, height, width")
    if len(tensor.values) != math.prod(wanted):
        raise InvalidField(f"{field}.values", f"{len(tensor.values)} values", f"{math.prod(wanted)} are needed")
    values = np.array(tensor.values, np.float32).reshape(wanted)
    if not np.isfinite(values).all():
        raise InvalidField(f"{field}.values", "values that are not finite", "must be finite")
    return values


def _decode(field: str, content: bytes, expected: ImageInput, resize: bool) -> Array:
    size = (expected.width, expected.height)
    shown = f"a file of {len(content)} bytes"
    try:
        with Image.open(BytesIO(content), formats=("PNG", "JPEG")) as opened:
            width, height = opened.size
            if opened.size != size and not resize:
                limit = f"must be {size[0]} x {size[1]}; scale it, or set resize"
                raise InvalidField(field, f"{width} x {height} pixels", limit)
            if width * height > max(MAX_PIXELS, size[0] * size[1]):
                raise InvalidField(field, f"{width} x {height} pixels", f"at most {MAX_PIXELS} pixels can be resized")
            pixels = _channels(opened, expected.channels)
    except UnidentifiedImageError:
        raise InvalidField(field, shown, "must be a PNG or JPEG file") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damage
        raise InvalidField(field, shown, f"cannot be decoded: {error}") from None
    planes = [np.asarray(_resized(plane, size), np.float32) for plane in pixels]
    return np.stack(planes)


def _channels(image: Image.Image, channels: int) -> list[Image.Image]:
    """Return a grey plane, or those of red, green and blue, with float values from 0 to 1."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would cut off at 255
        grey = Image.fromarray(np.asarray(image, np.float32) / 65535)
        return [grey] * channels
    converted = image.convert("L" if channels == 1 else "RGB")
    return [Image.fromarray(np.asarray(plane, np.float32) / 255) for plane in converted.split()]


def _resized(plane: Image.Image, size: tuple[int, int]) -> Image.Image:
    return plane if plane.size == size else plane.resize(size, Image.Resampling.BOX)
