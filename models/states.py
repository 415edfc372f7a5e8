"""What a layer remembers between steps: declared by the layer, held here, obeyed by whoever runs the model.

Shapes: B rows, K key/value heads, T new tokens, C capacity, S source length, D head width. A row counts the tokens it
has consumed; that count is the only source of positions. Nothing is written in place: a step takes a state and returns
the next.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

CAPACITY = "capacity"
"""The axis of an `append` state that grows with the sequence."""
SOURCE = "source"
"""The axis of a `fixed` state that is as long as the source it was made from."""


class StateRule(StrEnum):
    """What happens to a state between two steps; the names are those of the bundle manifest."""

    APPEND = "append"
    """Position p is written at index p of the capacity axis."""
    RING = "ring"
    """Position p is written at index p modulo a fixed capacity."""
    REPLACE = "replace"
    """The output of one step is the input of the next."""
    FIXED = "fixed"
    """Made once for a sequence, only read afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpec:
    """A layer's declaration of one state: `shape` is that of one row.

    An append state has `CAPACITY` in its shape; a fixed one has `SOURCE` if it is as long as the source.
    With a `window`, positions further behind than that are never read again. A state that is `made` begins as what the
    model makes of a source, which a fixed one always does; the others begin as zeros.
    """

    name: str
    rule: StateRule
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    window: int | None = None
    made: bool = False

    def __post_init__(self) -> None:
        if (CAPACITY in self.shape) != (self.rule is StateRule.APPEND):
            raise ValueError(
                f"state {self.name}: rule {self.rule} with shape {self.shape}; append states have {CAPACITY!r}"
            )
        if SOURCE in self.shape and self.rule is not StateRule.FIXED:
            raise ValueError(f"state {self.name}: rule {self.rule} with shape {self.shape}; {SOURCE!r} is for fixed")

    def row_shape(self, capacity: int, source_len: int = 0) -> tuple[int, ...]:
        """Return the shape of one row in a state that holds `capacity` positions of a source of `source_len`."""
        symbols = {CAPACITY: capacity, SOURCE: source_len}
        return tuple(symbols[size] if isinstance(size, str) else size for size in self.shape)

    @property
    def bytes_per_token(self) -> int:
        """Memory that one more token costs; 0 unless the state is appended to."""
        size = torch.Size(self.row_shape(1)).numel() * self.dtype.itemsize
        return size if self.rule is StateRule.APPEND else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The new tokens of a step: row b brings positions [start_b, start_b + lengths_b), right-padded.

    `start` and `lengths` are int64 of shape (B,), or (1,) where all rows are alike; T is `num_tokens`. `is_global`
    (B, T) marks the tokens that a sparse pattern lets see, and be seen by, all others; None marks none. `is_whole`
    says that there is no padding, as far as that is known without a look at `lengths`.
    """

    start: Tensor
    lengths: Tensor
    num_tokens: int
    is_global: Tensor | None = None
    is_whole: bool = False

    @classmethod
    def of(
        cls,
        token_ids: Tensor,
        lengths: Tensor | None = None,
        start: Tensor | None = None,
        *,
        is_global: Tensor | None = None,
    ) -> "Chunk":
        """Describe token_ids (B, T), of which the first `lengths` of each row are real, all by default.

        Raises:
            ValueError: lengths have another shape than (B,) or lie outside 0..T.
        """
        rows, num_tokens = token_ids.shape
        is_whole = lengths is None
        if lengths is None:
            lengths = torch.full((1,), num_tokens, dtype=torch.int64, device=token_ids.device)
        elif lengths.shape != (rows,):
            raise ValueError(f"lengths has shape {tuple(lengths.shape)}; token_ids has {rows} rows")
        elif not torch.compiler.is_exporting() and rows and (lengths.min() < 0 or lengths.max() > num_tokens):
            raise ValueError(f"lengths {lengths.tolist()} must lie in 0..{num_tokens}, the tokens given")
        return cls(
            start=torch.zeros_like(lengths) if start is None else start,
            lengths=lengths.to(torch.int64),
            num_tokens=num_tokens,
            is_global=is_global,
            is_whole=is_whole,
        )

    @property
    def positions(self) -> Tensor:
        """Absolute positions (B or 1, T); those of padding continue the row's."""
        return self.start[:, None] + self._offsets

    @property
    def valid(self) -> Tensor:
        """(B or 1, T) booleans, False for padding."""
        return self._offsets < self.lengths[:, None]

    @property
    def _offsets(self) -> Tensor:
        return torch.arange(self.num_tokens, device=self.lengths.device)


def append(past: Tensor, new: Tensor, chunk: Chunk) -> Tensor:
    """Return `past` (B, K, C, D) with the valid tokens of `new` (B, K, T, D) at each row's next positions."""
    if chunk.is_whole and torch.compiler.is_exporting():
        return write_in_place(past, new, chunk.start)
    if chunk.num_tokens == 0:
        return past
    capacity = past.shape[2]
    offset = torch.arange(capacity, device=past.device) - chunk.start[:, None]  # (B or 1, C): index into `new`
    written = (offset >= 0) & (offset < chunk.lengths[:, None])
    source = offset.clamp(0, chunk.num_tokens - 1)[:, None, :, None].expand(*new.shape[:2], capacity, new.shape[3])
    return torch.where(written[:, None, :, None], new.gather(2, source), past)


@torch.library.custom_op("attendant::write_in_place", mutates_args=())
def write_in_place(past: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """Return `past` (B, K, C, D) with `new` (B, K, T, D) at positions [start_b, start_b + T) of row b.

    It is what `append` becomes in an exported graph, under a name that an exporter can turn into an operator which
    writes into the memory of `past`.
    """
    positions = start[:, None] + torch.arange(new.shape[2], device=new.device)
    return past.scatter(2, positions[:, None, :, None].expand_as(new), new)


@write_in_place.register_fake
def _(past: Tensor, new: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(past)


def ring_positions(consumed: Tensor, capacity: int) -> Tensor:
    """Return which position each slot of a ring holds, (B or 1, C) int64; negative where a slot is still empty.

    Position p lies in slot p mod C, so after n tokens slot s holds the last position before n that is s modulo C.
    """
    slots = torch.arange(capacity, device=consumed.device)
    last = consumed[:, None] - 1
    return last - (last - slots) % capacity


def ring_write(past: Tensor, new: Tensor, chunk: Chunk) -> Tensor:
    """Return `past` (B, K, C, D) with the last C valid tokens of `new` (B, K, T, D) in their slots."""
    if chunk.num_tokens == 0:
        return past
    held = ring_positions(chunk.start + chunk.lengths, past.shape[2])
    offset = held - chunk.start[:, None]  # (B or 1, C): index into `new`; what lay there before is negative
    source = offset.clamp(min=0)[:, None, :, None].expand(*new.shape[:2], past.shape[2], new.shape[3])
    return torch.where((offset >= 0)[:, None, :, None], new.gather(2, source), past)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All states of a batch: `tensors[name]` is (B, *row shape), `lengths` (B,) int64 tokens consumed.

    `source_lengths` (B,) int64 says how much of a fixed state with a `SOURCE` axis is real; None without a source.
    """

    specs: tuple[StateSpec, ...]
    tensors: dict[str, Tensor]
    lengths: Tensor
    capacity: int
    source_lengths: Tensor | None = None

    @classmethod
    def empty(
        cls,
        specs: Iterable[StateSpec],
        rows: int,
        capacity: int,
        device: torch.device,
        *,
        fixed: Mapping[str, Tensor] | None = None,
        source_lengths: Tensor | None = None,
    ) -> "State":
        """Return the state of `rows` sequences that have consumed nothing. Unused slots are zero, never garbage.

        Args:
            specs: the declarations.
            rows: how many sequences.
            capacity: how many tokens each may come to.
            device: where the tensors lie.
            fixed: tensors that are already made, by name; every fixed state is among them.
            source_lengths: (B,) int64.
        """
        specs, fixed = tuple(specs), dict(fixed or {})
        tensors = {
            spec.name: fixed[spec.name]
            if spec.rule is StateRule.FIXED or spec.name in fixed
            else torch.zeros(rows, *spec.row_shape(capacity), dtype=spec.dtype, device=device)
            for spec in specs
        }
        lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        return cls(specs=specs, tensors=tensors, lengths=lengths, capacity=capacity, source_lengths=source_lengths)

    def advance(self, chunk: Chunk, tensors: Mapping[str, Tensor]) -> "State":
        """Return the state after a step that produced `tensors`; what the step did not produce stays as it is."""
        return replace(self, tensors=self.tensors | dict(tensors), lengths=self.lengths + chunk.lengths)

    @property
    def source_valid(self) -> Tensor | None:
        """(B, S) booleans, False for padding of the source; None without a source."""
        if self.source_lengths is None:
            return None
        spec = next(spec for spec in self.specs if SOURCE in spec.shape)
        source_len = self.tensors[spec.name].shape[1 + spec.shape.index(SOURCE)]
        return torch.arange(source_len, device=self.lengths.device) < self.source_lengths[:, None]

    def select(self, rows: Tensor) -> "State":
        """Return the state of the given rows: int64 indices, repeats allowed."""
        tensors = {name: tensor[rows] for name, tensor in self.tensors.items()}
        source_lengths = None if self.source_lengths is None else self.source_lengths[rows]
        return replace(self, tensors=tensors, lengths=self.lengths[rows], source_lengths=source_lengths)

    @property
    def num_bytes(self) -> int:
        """Memory held by the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
