"""The step graph over slot pools: the one place that enforces what ONNX Runtime does not.

Rules (measured, docs/bundle.md): never no rows (it kills the process); several new tokens and a past only for one row;
a chunk has its exact length; `total_length` is always the capacity, because equal to the number of new tokens it would
mean "no row has a past" and destroy one that has; raw addresses do not keep arrays alive, so this object does.

Axes: rows B, new tokens T, slots S, vocabulary V.
"""

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from attendant.bundle import GraphKind, GraphSpec, Manifest, Role, StateRule
from service.bundle import BundleRefused, FoundBundle
from service.engine.pools import StatePool
from service.engine.runtime import create_session

Logits = NDArray[np.float32]


class _Binding:
    """One set of bound buffers; the addresses stay valid as long as this object lives."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.io = session.io_binding()
        self._kept: dict[str, NDArray[np.generic]] = {}

    def input(self, name: str, array: NDArray[np.generic]) -> None:
        self._kept[name] = array
        self.io.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def output(self, name: str, array: NDArray[np.generic]) -> None:
        self._kept[name] = array
        self.io.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self) -> None:
        self.session.run_with_iobinding(self.io)


class StepGraph:
    """Runs decode rows and prefill chunks of one bundle in place on its state pools. Not thread-safe.

    Args:
        found: a bundle whose files were verified.
        num_slots: S.
        capacity: positions of one slot.

    Raises:
        BundleRefused: the graph does not fit the manifest, or needs what this build does not serve.
    """

    def __init__(self, found: FoundBundle, num_slots: int, capacity: int) -> None:
        manifest = found.manifest
        graph = manifest.graph(GraphKind.STEP)
        if graph is None:
            raise BundleRefused("it has no step graph: this build serves generating decoders")
        unsupported = sorted({state.rule.value for state in manifest.states if state.rule is not StateRule.APPEND})
        if unsupported:
            raise BundleRefused(f"states with rule {unsupported} are not served by this build")
        self.num_slots = num_slots
        self.capacity = capacity
        self.vocab_size = _vocab_size(manifest, graph)
        self.pools = tuple(StatePool(state, num_slots, capacity) for state in manifest.states)
        self._session = create_session(found.directory, graph)
        self._names = {tensor.role: tensor.name for tensor in (*graph.inputs, *graph.outputs)}
        self._total_length = np.array(capacity, np.int32)
        # Inputs and output of the decode rows; a binding for B rows takes the first B of each.
        self._token_ids = np.zeros((num_slots, 1), np.int64)
        self._lengths = np.zeros(num_slots, np.int32)
        self._logits_index = np.arange(num_slots, dtype=np.int64)
        self._logits = np.zeros((num_slots, self.vocab_size), np.float32)
        self._decode_bindings: dict[int, _Binding] = {}
        self._chunk_bindings: dict[int, _Binding] = {}

    def decode(self, token_ids: Sequence[int], lengths: Sequence[int]) -> Logits:
        """Feed one token to each of the slots 0..B-1.

        Args:
            token_ids: B tokens.
            lengths: tokens of each row, the new one included, at most the capacity.

        Returns:
            Logits [B, V], valid until the next call.
        """
        num_rows = len(token_ids)
        assert 0 < num_rows == len(lengths) <= self.num_slots, (num_rows, len(lengths), self.num_slots)
        assert min(lengths) > 0 and max(lengths) <= self.capacity, (lengths, self.capacity)
        self._token_ids[:num_rows, 0] = token_ids
        self._lengths[:num_rows] = lengths
        binding = self._decode_bindings.get(num_rows)
        if binding is None:
            binding = self._decode_bindings[num_rows] = self._bind(0, num_rows)
            binding.input(self._names[Role.TOKEN_IDS], self._token_ids[:num_rows])
            binding.input(self._names[Role.LENGTHS], self._lengths[:num_rows])
            binding.input(self._names[Role.LOGITS_INDEX], self._logits_index[:num_rows])
            binding.output(self._names[Role.LOGITS], self._logits[:num_rows])
        binding.run()
        return self._logits[:num_rows]

    def chunk(self, slot: int, token_ids: Sequence[int], start: int, *, every_position: bool = False) -> Logits:
        """Feed positions [start, start + T) to one slot.

        Args:
            slot: the row of the pools.
            token_ids: T tokens, exactly as many as there are.
            start: positions already written.
            every_position: return logits of all T positions instead of the last one only.

        Returns:
            Logits [1, V], or [T, V].
        """
        num_tokens = len(token_ids)
        end = start + num_tokens
        assert 0 <= slot < self.num_slots and num_tokens > 0 and start >= 0 and end <= self.capacity, (
            slot,
            start,
            end,
        )
        binding = self._chunk_bindings.get(slot)
        if binding is None:
            binding = self._chunk_bindings[slot] = self._bind(slot, 1)
        wanted = np.arange(num_tokens) if every_position else np.array([num_tokens - 1])
        logits = np.empty((len(wanted), self.vocab_size), np.float32)
        binding.input(self._names[Role.TOKEN_IDS], np.array([token_ids], np.int64))
        binding.input(self._names[Role.LENGTHS], np.array([end], np.int32))
        binding.input(self._names[Role.LOGITS_INDEX], wanted.astype(np.int64))
        binding.output(self._names[Role.LOGITS], logits)
        binding.run()
        return logits

    def copy(self, source: int, destination: int, length: int) -> None:
        """Copy the states of positions [0, length) from slot to slot."""
        for pool in self.pools:
            pool.copy(source, destination, length)

    def release(self, slot: int) -> None:
        """Give the memory of a slot back to the system."""
        for pool in self.pools:
            pool.release(slot)

    def _bind(self, first_slot: int, num_rows: int) -> _Binding:
        binding = _Binding(self._session)
        binding.input(self._names[Role.TOTAL_LENGTH], self._total_length)
        for pool in self.pools:
            rows = pool.array[first_slot : first_slot + num_rows]
            assert pool.spec.output is not None
            # Past and present at one address is what makes the graph write in place.
            binding.input(pool.spec.input, rows)
            binding.output(pool.spec.output, rows)
        return binding


def _vocab_size(manifest: Manifest, graph: GraphSpec) -> int:
    assert manifest.vocabulary is not None, "the schema demands a vocabulary of a generating bundle"
    size, logits = manifest.vocabulary.size, graph.output(Role.LOGITS)
    if logits is None or logits.axes[-1] != size:
        raise BundleRefused(f"the vocabulary has {size} tokens, the logits are {logits and logits.axes}")
    return size
