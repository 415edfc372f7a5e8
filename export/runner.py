"""Runs a bundle's step graph, and its encode graph, in ONNX Runtime to certify them; the service has its own engine.

Rows are those of the states; a step runs a contiguous range of them. Names and axes of the graphs' tensors tell what
each state needs: docs/bundle.md. `append` states are bound in place; what a step replaces is written beside the state
and committed after it; `fixed` states are bound at the length of the longest source, with junk behind a shorter one.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import ArrayLike, NDArray

from attendant.bundle import CAPACITY, SOURCE

NUM_THREADS = 2
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
_JUNK = 7.0  # finite, and large beside what is real

Array = NDArray[Any]


class Runner:
    """A session of one step graph, and states of `num_rows` rows for `capacity` tokens each.

    Args:
        graph: the step graph's file.
        num_rows: how many rows there are.
        capacity: tokens that a row can hold.
        num_threads: of each session.
        prefill_chunk: the pieces that prompts are cut into, where the bundle demands it.
        encode: the encode graph's file, where rows are about a source.
        source_len: the length that states of a source are bound at.
    """

    def __init__(
        self,
        graph: Path,
        *,
        num_rows: int,
        capacity: int,
        num_threads: int = NUM_THREADS,
        prefill_chunk: int | None = None,
        encode: Path | None = None,
        source_len: int = 0,
    ) -> None:
        self.session = open_session(graph, num_threads)
        self.num_rows = num_rows
        self.capacity = capacity
        self.prefill_chunk = prefill_chunk
        self._encode = None if encode is None else open_session(encode, num_threads)
        self._inputs = {tensor.name for tensor in self.session.get_inputs()}
        states = [each for each in self.session.get_inputs() if each.name.startswith(("past.", "fixed."))]
        sizes = {CAPACITY: capacity, SOURCE: source_len}
        self.states = {
            each.name: np.zeros((num_rows, *(sizes.get(axis, axis) for axis in each.shape[1:])), _DTYPES[each.type])
            for each in states
        }
        self._replaced = [each.name for each in states if each.name.startswith("past.") and CAPACITY not in each.shape]
        self._initial = {name: np.zeros_like(self.states[name]) for name in self._replaced}
        self._source_lengths = np.zeros(num_rows, np.int32)

    def begin(self, source: Array, *, row: int = 0) -> None:
        """Make the row be about a source; what it holds of another is forgotten when it is fed its first token."""
        for name, made in self.encode([source])[0].items():
            state = name.removeprefix("made.")
            if f"past.{state}" in self._initial:
                self._initial[f"past.{state}"][row] = made
                continue
            target = self.states[f"fixed.{state}"][row]
            target.fill(_JUNK)
            target[tuple(slice(size) for size in made.shape)] = made
        self._source_lengths[row] = len(source)

    def encode(self, sources: list[Array]) -> list[dict[str, Array]]:
        """Encode sources together and return what is made of each, cut to its own length."""
        assert self._encode is not None, "the bundle has no encode graph"
        outputs = [output.name for output in self._encode.get_outputs()]
        if sources[0].ndim > 1:
            arrays = self._encode.run(outputs, {"image": np.stack(sources)})
            return [
                {name: array[row] for name, array in zip(outputs, arrays, strict=True)} for row in range(len(sources))
            ]
        lengths = np.array([len(source) for source in sources], np.int32)
        source_ids = np.zeros((len(sources), lengths.max()), np.int64)
        for row, source in enumerate(sources):
            source_ids[row, : len(source)] = source
        arrays = self._encode.run(outputs, {"source_ids": source_ids, "source_lengths": lengths})
        axes = {output.name: output.shape[1:] for output in self._encode.get_outputs()}

        def own(name: str, array: Array, length: int) -> Array:
            return array[tuple(slice(length) if axis == SOURCE else slice(None) for axis in axes[name])]

        return [
            {name: own(name, array[row], length) for name, array in zip(outputs, arrays, strict=True)}
            for row, length in enumerate(lengths)
        ]

    def step(
        self,
        token_ids: ArrayLike,
        lengths: ArrayLike,
        logits_index: ArrayLike | None = None,
        *,
        first_row: int = 0,
        commit: bool = True,
    ) -> NDArray[np.float32]:
        """Feed new tokens to the rows from `first_row` on and return the logits that are wanted.

        Args:
            token_ids: [B, S], all real; with S > 1 and a past B must be 1.
            lengths: [B], tokens of each row, the new ones included.
            logits_index: flat positions row * S + token; None wants the last token of each row.
            first_row: row of the states that the first row of `token_ids` belongs to.
            commit: keep the states after the step; without, the same step can be taken again.

        Returns:
            Logits [len(logits_index), V], a copy.
        """
        tokens, lengths = np.ascontiguousarray(token_ids, np.int64), np.ascontiguousarray(lengths, np.int32)
        num_rows, num_tokens = tokens.shape
        assert 0 < num_rows <= self.num_rows - first_row, (num_rows, first_row, self.num_rows)
        assert num_tokens > 0 and np.max(lengths) <= self.capacity, (num_tokens, lengths, self.capacity)
        if logits_index is None:
            logits_index = np.arange(num_rows) * num_tokens + num_tokens - 1
        rows = slice(first_row, first_row + num_rows)
        fresh = first_row + np.flatnonzero(lengths == num_tokens)
        for name, initial in self._initial.items():
            self.states[name][fresh] = initial[fresh]
        given: dict[str, Array] = {
            "token_ids": tokens,
            "lengths": lengths,
            "total_length": np.array(self.capacity, np.int32),
            "logits_index": np.ascontiguousarray(logits_index, np.int64),
            "source_lengths": self._source_lengths[rows],
        }
        binding = self.session.io_binding()
        for name, array in given.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, array)
        after = {name: np.empty_like(self.states[name][rows]) for name in self._replaced}
        for name, state in self.states.items():
            before = state[rows]
            binding.bind_input(name, *_where(before))
            if name.startswith("past."):
                binding.bind_output(name.replace("past.", "present."), *_where(after.get(name, before)))
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding)
        for name, array in after.items() if commit else ():
            self.states[name][rows] = array
        logits: NDArray[np.float32] = binding.get_outputs()[-1].numpy().copy()
        return logits

    def prefill(self, prompt: ArrayLike, *, row: int = 0, chunks: ArrayLike | None = None) -> NDArray[np.float32]:
        """Feed a whole prompt [P] to an empty row, in chunks of the given sizes, and return its last logits [V]."""
        prompt = np.asarray(prompt)
        end = 0
        for size in self._cuts(len(prompt)) if chunks is None else chunks:
            logits = self.step(prompt[None, end : end + size], [end + size], first_row=row)
            end += size
        assert end == len(prompt), (end, len(prompt))
        return logits[0]

    def all_logits(self, text: ArrayLike, *, row: int = 0) -> NDArray[np.float32]:
        """Feed a text [N] to a row, in one pass where that is allowed, and return the logits [N, V]."""
        text, parts, end = np.asarray(text), [], 0
        for size in self._cuts(len(text)):
            parts.append(self.step(text[None, end : end + size], [end + size], np.arange(size), first_row=row))
            end += size
        return np.concatenate(parts)

    def _cuts(self, length: int) -> list[int]:
        size = self.prefill_chunk or length
        return [min(size, length - start) for start in range(0, length, size)]


def open_session(graph: Path, num_threads: int = NUM_THREADS) -> ort.InferenceSession:
    """Open a graph for runs whose shapes differ from one to the next."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _where(array: Array) -> tuple[Any, ...]:
    return "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
