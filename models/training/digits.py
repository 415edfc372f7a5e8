"""Handwritten digits, and pictures made of them: grids whose cells hold a digit, a fragment of one, or nothing.

Shapes: B pictures, R rows and K columns of cells, 8 x 8 pixels a cell; pixels are float32 from 0 (paper) to 1 (ink).
Everything random is drawn from the generator given, or from torch's global one.
"""

import gzip
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from models.training.text import DATA

FILE = "digits.csv.gz"
NUM_TEST = 397
SIZE = 8
FRAGMENT = 5
"""Side of the square that is cut out of a digit to make a fragment, in pixels."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits(NamedTuple):
    """images (B, 1, 8, 8) and labels (B,), int64, 0 to 9."""

    images: Tensor
    labels: Tensor

    def draw(self, shape: tuple[int, ...], generator: Generator | None = None) -> "Digits":
        """Return digits drawn with replacement: images (*shape, 1, 8, 8) and labels of the given shape."""
        index = torch.randint(len(self.labels), shape, generator=generator)
        return Digits(self.images[index], self.labels[index])

    def distorted(self, strength: float, generator: Generator | None = None) -> "Digits":
        """Return the digits, each turned, stretched and shifted a little, as another hand might have written it.

        At a strength of 1 the standard deviations are 0.15 radians, 10 % and half a pixel.
        """
        rows = len(self.images)
        noise = strength * torch.randn(rows, 5, generator=generator)
        angle, stretch, shift = 0.15 * noise[:, 0], 1.0 + 0.1 * noise[:, 1:3], 0.125 * noise[:, 3:]
        rotation = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1).unflatten(1, (2, 2))
        transform = torch.cat((rotation * stretch[:, None], shift[..., None]), 2)  # shifts are in half widths
        grid = F.affine_grid(transform, list(self.images.shape), align_corners=False)
        return Digits(F.grid_sample(self.images, grid, align_corners=False), self.labels)


class Cluttered(NamedTuple):
    """images (B, 1, 8 R, 8 K), labels (B,) of their only whole digit, places (B,) of its cell in reading order."""

    images: Tensor
    labels: Tensor
    places: Tensor


class Scenes(NamedTuple):
    """images (B, 1, 16, 16) and what their four cells hold, in reading order: (B, 4) labels, -1 for nothing."""

    images: Tensor
    cells: Tensor


def read_digits(part: str) -> Digits:
    """Return the "training" digits, 1,400, or the "test" digits, 397 that are spread evenly over the file.

    The same 13 people wrote both parts.

    Raises:
        ValueError: the part is neither.
    """
    if part not in ("training", "test"):
        raise ValueError(f"part is {part!r}; it must be training or test")
    with gzip.open(DATA / FILE) as file:
        rows = torch.from_numpy(numpy.loadtxt(file, delimiter=",", dtype=numpy.int64))
    # The number of rows is no multiple of NUM_TEST, a prime, so exactly NUM_TEST rows fall below it.
    held_out = torch.arange(len(rows)) * NUM_TEST % len(rows) < NUM_TEST
    rows = rows[held_out if part == "test" else ~held_out]
    return Digits(rows[:, :-1].reshape(-1, 1, SIZE, SIZE).float() / 16, rows[:, -1])


def cluttered(digits: Digits, num: int, grid: tuple[int, int], generator: Generator | None = None) -> Cluttered:
    """Draw pictures with one whole digit each, in a random cell; all other cells hold fragments of other digits."""
    num_cells = grid[0] * grid[1]
    cells = _fragments(digits, (num, num_cells), generator)
    whole = digits.draw((num,), generator)
    places = torch.randint(num_cells, (num,), generator=generator)
    cells[torch.arange(num), places] = whole.images
    return Cluttered(join_cells(cells, grid), whole.labels, places)


def scenes(digits: Digits, num: int, generator: Generator | None = None) -> Scenes:
    """Draw pictures of two by two cells with one to four digits, each number as likely, in random cells."""
    drawn = digits.draw((num, 4), generator)
    count = torch.randint(1, 5, (num, 1), generator=generator)
    filled = torch.rand(num, 4, generator=generator).argsort(1).argsort(1) < count
    images = drawn.images * filled[..., None, None, None]
    return Scenes(join_cells(images, (2, 2)), drawn.labels.masked_fill(~filled, -1))


def join_cells(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Put cells (B, R * K, C, P, P), in reading order, side by side: (B, C, P R, P K)."""
    return cells.unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _fragments(digits: Digits, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """Cut a random square out of a random digit for each cell, and paste it elsewhere: (*shape, 1, 8, 8)."""
    images = digits.draw(shape, generator).images
    taken, put = (torch.randint(SIZE - FRAGMENT + 1, (2, *shape, 2), generator=generator)).unbind(0)
    steps = torch.arange(SIZE)
    offset = steps - put[..., None]  # (*shape, 2, 8): where in the fragment a row or column of the cell lies
    inside = (offset >= 0) & (offset < FRAGMENT)
    source = (taken[..., None] + offset).clamp(0, SIZE - 1)
    rows, columns = source[..., 0, :, None], source[..., 1, None, :]
    pixels = (
        images.squeeze(-3).gather(-2, rows.expand(*shape, SIZE, SIZE)).gather(-1, columns.expand(*shape, SIZE, SIZE))
    )
    return (pixels * (inside[..., 0, :, None] & inside[..., 1, None, :]))[..., None, :, :]
