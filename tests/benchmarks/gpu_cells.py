"""What is measured on a GPU, what it costs at least, and what fits: arithmetic only.

The roofline of a decode step: whichever is longer, moving the bytes it must read once (weights, and the keys and values
of every row) at the bandwidth of a copy, or its multiplications at the rate of a large matrix product.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ROWS = (1, 128, 32, 8, 256)  # those with a target come first, should the time not do for all
CONTEXTS = (128, 2048, 8192)
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
WORKSPACE_BYTES = 6 << 30  # both sides: contexts, compiled graphs, activations of a prompt, captured graphs


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder of the Llama family: gated feed-forward, no biases, an output table of its own unless `tied`."""

    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    tied: bool

    @property
    def multiplied(self) -> int:
        """Weights that every new token is multiplied with, the output table included."""
        attention = 2 * self.d_model * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.d_model * self.d_ff) + self.d_model * self.vocab_size

    @property
    def parameters(self) -> int:
        """All weights."""
        norms = (2 * self.num_layers + 1) * self.d_model
        return self.multiplied + norms + (0 if self.tied else self.d_model * self.vocab_size)

    @property
    def kept_per_token(self) -> int:
        """Elements of keys and values that a position leaves."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def operations(self, new_tokens: int, attended: int) -> int:
        """Return additions and multiplications of tokens that together attend to so many positions."""
        per_pair = 4 * self.num_layers * self.num_heads * self.head_dim
        return 2 * self.multiplied * new_tokens + per_pair * attended


SHAPES = {
    "smollm2-135m": Shape(
        num_layers=30,
        d_model=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        d_ff=1536,
        vocab_size=49152,
        tied=True,
    ),
    "llama-tiny": Shape(
        num_layers=4,
        d_model=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        d_ff=704,
        vocab_size=2048,
        tied=False,
    ),
    "llama-1.3b": Shape(
        num_layers=24,
        d_model=2048,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        d_ff=5504,
        vocab_size=32000,
        tied=False,
    ),
    "llama-7b": Shape(
        num_layers=32,
        d_model=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        d_ff=11008,
        vocab_size=32000,
        tied=False,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What a device was measured to do: bytes a second of a copy, read and written both, and operations a second."""

    bandwidth: float
    matrix_peak: float


def decode_floor(shape: Shape, rows: int, context: int, precision: str, ceilings: Ceilings) -> float:
    """Return the seconds that a step of `rows` rows, each of `context` positions, takes at least."""
    elements = shape.multiplied + rows * context * shape.kept_per_token
    moving = elements * ITEM_BYTES[precision] / ceilings.bandwidth
    return max(moving, shape.operations(rows, rows * context) / ceilings.matrix_peak)


def prefill_floor(shape: Shape, tokens: int, precision: str, ceilings: Ceilings) -> float:
    """Return the seconds that one prompt takes at least; only its last position asks for logits."""
    output = shape.d_model * shape.vocab_size
    operations = shape.operations(tokens, tokens * (tokens + 1) // 2) - 2 * output * (tokens - 1)
    return max(shape.multiplied * ITEM_BYTES[precision] / ceilings.bandwidth, operations / ceilings.matrix_peak)


def capacity_for(context: int, steps: int) -> int:
    """Return the positions of a slot in which so many steps around a context are measured, joining included."""
    return -(-(context + steps + 128) // 64) * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Cells of one context that are measured with both sides loaded at once, or (`apart`) one after the other."""

    context: int
    rows: tuple[int, ...]
    apart: bool


def groups(
    shape: Shape, precision: str, contexts: Iterable[int], rows: Sequence[int], steps: int, memory: int
) -> list[Group]:
    """Share the cells that fit into `memory` bytes among as few loads as can be; others are left out."""
    item = ITEM_BYTES[precision]
    weights = shape.parameters * item
    made = []
    for context in contexts:
        row_bytes = capacity_for(context, steps) * shape.kept_per_token * item
        together = tuple(n for n in rows if 2 * (weights + n * row_bytes) + WORKSPACE_BYTES <= memory)
        alone = tuple(n for n in rows if n not in together and weights + n * row_bytes + WORKSPACE_BYTES <= memory)
        made += [Group(context=context, rows=n, apart=apart) for n, apart in ((together, False), (alone, True)) if n]
    return made
