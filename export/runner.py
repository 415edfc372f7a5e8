"""Runs a step graph in ONNX Runtime over its own KV cache, to certify it; the service has its own engine.

Past and present of a state are one array, so the graph writes in place. Rows are those of the cache; a step runs a
contiguous range of them.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import ArrayLike, NDArray

NUM_THREADS = 2


class Runner:
    """A session of one step graph, and a cache of `num_rows` rows for `capacity` tokens each."""

    def __init__(self, graph: Path, *, num_rows: int, capacity: int, num_threads: int = NUM_THREADS) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # shapes differ from step to step
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.num_rows = num_rows
        self.capacity = capacity
        self.states = {
            tensor.name: np.zeros((num_rows, tensor.shape[1], capacity, tensor.shape[3]), np.float32)
            for tensor in self.session.get_inputs()
            if tensor.name.startswith("past.")
        }

    def step(
        self, token_ids: ArrayLike, lengths: ArrayLike, logits_index: ArrayLike | None = None, *, first_row: int = 0
    ) -> NDArray[np.float32]:
        """Feed new tokens to the rows from `first_row` on and return the logits that are wanted.

        Args:
            token_ids: [B, S], all real; with S > 1 and a past B must be 1.
            lengths: [B], tokens of each row, the new ones included.
            logits_index: flat positions row * S + token; None wants the last token of each row.
            first_row: row of the cache that the first row of `token_ids` belongs to.

        Returns:
            Logits [len(logits_index), V], a copy.
        """
        tokens = np.ascontiguousarray(token_ids, np.int64)
        num_rows, num_tokens = tokens.shape
        assert 0 < num_rows <= self.num_rows - first_row, (num_rows, first_row, self.num_rows)
        assert num_tokens > 0 and np.max(lengths) <= self.capacity, (num_tokens, lengths, self.capacity)
        if logits_index is None:
            logits_index = np.arange(num_rows) * num_tokens + num_tokens - 1
        binding = self.session.io_binding()
        binding.bind_cpu_input("token_ids", tokens)
        binding.bind_cpu_input("lengths", np.ascontiguousarray(lengths, np.int32))
        binding.bind_cpu_input("total_length", np.array(self.capacity, np.int32))
        binding.bind_cpu_input("logits_index", np.ascontiguousarray(logits_index, np.int64))
        for name, cache in self.states.items():
            rows = cache[first_row : first_row + num_rows]
            where = ("cpu", 0, np.float32, rows.shape, rows.ctypes.data)
            binding.bind_input(name, *where)
            binding.bind_output(name.replace("past.", "present."), *where)
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy().copy()

    def prefill(self, prompt: ArrayLike, *, row: int = 0, chunks: ArrayLike | None = None) -> NDArray[np.float32]:
        """Feed a whole prompt [P] to an empty row, in chunks of the given sizes, and return its last logits [V]."""
        prompt = np.asarray(prompt)
        end = 0
        for size in [len(prompt)] if chunks is None else chunks:
            logits = self.step(prompt[None, end : end + size], [end + size], first_row=row)
            end += size
        assert end == len(prompt), (end, len(prompt))
        return logits[0]

    def all_logits(self, text: ArrayLike) -> NDArray[np.float32]:
        """Feed a text [N] to row 0 in one pass and return the logits [N, V] of every position."""
        text = np.asarray(text)
        return self.step(text[None], [len(text)], np.arange(len(text)))
