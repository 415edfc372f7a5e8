"""The step graph over slot pools: the one place that enforces what ONNX Runtime does not.

Rules (measured, docs/bundle.md): never no rows (it kills the process); several new tokens and a past only for one row;
a chunk has its exact length; `total_length` is always the capacity, because equal to the number of new tokens it would
mean "no row has a past" and destroy one that has, and prompts that are read together have none; raw addresses do not
keep arrays alive, so this object does.

Axes: rows B, new tokens T, slots S, vocabulary V.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from attendant.bundle import GraphKind, GraphSpec, Manifest, Role, StateRule
from service.bundle import BundleRefused, FoundBundle
from service.engine.binding import Binding
from service.engine.graph import Logits, padded
from service.engine.pools import make_pool, source_capacity
from service.engine.runtime import create_session
from service.engine.source_graph import Made, SourceGraph
from service.scheduling.work import Phase, Work, decode_work, prefill_work, prompts_work

_INPUTS = {
    Role.TOKEN_IDS,
    Role.LENGTHS,
    Role.TOTAL_LENGTH,
    Role.LOGITS_INDEX,
    Role.SOURCE_LENGTHS,
    Role.STATE,
}


class StepGraph:
    """Runs decode rows and prefill chunks of one bundle on its state pools. Not thread-safe.

    `sources` is what reads a source before a sequence about it begins, or None where there are no sources. `observer`,
    if any, is told of every run: its phase, its work, its seconds.

    Args:
        found: a bundle whose files were verified.
        num_slots: S.
        capacity: positions of one slot.

    Raises:
        BundleRefused: the graph does not fit the manifest, or needs what this build does not serve.
    """

    def __init__(self, found: FoundBundle, num_slots: int, capacity: int) -> None:
        manifest = found.manifest
        graph = step_spec(manifest)
        self.sources = SourceGraph(found) if manifest.graph(GraphKind.ENCODE) else None
        self.prefill_chunk = manifest.limits.prefill_chunk
        self.num_slots = num_slots
        self.capacity = capacity
        self.vocab_size = vocab_size(manifest, graph)
        source_positions = source_capacity(manifest)
        self.pools = tuple(make_pool(state, num_slots, capacity, source_positions) for state in manifest.states)
        # Nothing happens to the others after a step.
        self._other_pools = [
            pool for pool in self.pools if pool.spec.window or pool.spec.rule in (StateRule.REPLACE, StateRule.RING)
        ]
        self._session = create_session(found.directory, graph)
        self._names = {tensor.role: tensor.name for tensor in (*graph.inputs, *graph.outputs)}
        self._total_length = np.array(capacity, np.int32)
        self._source_lengths = np.ones(num_slots, np.int32)  # a row without any position to attend to has no result
        # Inputs and output of the decode rows; a binding for B rows takes the first B of each.
        self._token_ids = np.zeros((num_slots, 1), np.int64)
        self._lengths = np.zeros(num_slots, np.int32)
        self._logits_index = np.arange(num_slots, dtype=np.int64)
        self._logits = np.zeros((num_slots, self.vocab_size), np.float32)
        self._decode_bindings: dict[tuple[int, int], Binding] = {}
        self.observer: Callable[[Phase, Work, float], object] | None = None
        self._chunk_bindings: dict[int, Binding] = {}

    @property
    def rewinds(self) -> bool:
        """Whether a row can go back to any earlier position: nothing else was remembered than what lies there."""
        return self.sources is None and not self._other_pools

    @property
    def joins_prompts(self) -> bool:
        """Whether prompts may be read together: where lengths are what tells rows apart, and cuts do not matter."""
        return self.rewinds and self.prefill_chunk is None and Role.TOTAL_LENGTH in self._names

    def begin(self, slot: int, made: Made | None = None) -> None:
        """Begin a sequence in a slot, with what `sources` made of its source if it has one."""
        length = 0 if made is None else made.source_length
        self._source_lengths[slot] = max(1, length)
        for pool in self.pools:
            state = None if made is None or pool.spec.made is None else made.states[pool.spec.made]
            pool.begin(slot, state, length)

    def decode(
        self,
        token_ids: Sequence[int],
        lengths: Sequence[int],
        real: Sequence[int] | None = None,
        first_slot: int = 0,
    ) -> Logits:
        """Feed one token to each of B slots in a row.

        Args:
            token_ids: B tokens.
            lengths: tokens of each row, the new one included, at most the capacity.
            real: rows that are a sequence's, all if None; what the step makes of the others is not kept.
            first_slot: the slot of row 0.

        Returns:
            Logits [B, V], valid until the next call.
        """
        num_rows = len(token_ids)
        assert 0 < num_rows == len(lengths) <= self.num_slots - first_slot, (num_rows, first_slot, self.num_slots)
        assert min(lengths) > 0 and max(lengths) <= self.capacity, (lengths, self.capacity)
        self._token_ids[:num_rows, 0] = token_ids
        self._lengths[:num_rows] = lengths
        binding = self._decode_bindings.get((first_slot, num_rows))
        if binding is None:
            binding = self._decode_bindings[first_slot, num_rows] = self._bind(first_slot, num_rows)
            binding.input(self._names[Role.TOKEN_IDS], self._token_ids[:num_rows])
            binding.input(self._names[Role.LENGTHS], self._lengths[:num_rows])
            binding.input(self._names[Role.LOGITS_INDEX], self._logits_index[:num_rows])
            binding.output(self._names[Role.LOGITS], self._logits[:num_rows])
        started = time.perf_counter()
        binding.run()
        if self.observer is not None:
            self.observer("decode", decode_work(lengths), time.perf_counter() - started)
        kept = range(num_rows) if real is None else real
        self._keep({first_slot + row: lengths[row] for row in kept})
        return self._logits[:num_rows]

    def prompts(self, first_slot: int, prompts: Sequence[Sequence[int]]) -> Logits:
        """Feed whole prompts to as many slots in a row, which have just begun, in one run: only where `joins_prompts`.

        What is padded is written behind each prompt's end, where its next tokens will be.

        Args:
            first_slot: the slot of the first.
            prompts: B of them.

        Returns:
            Logits [B, V] of their ends.
        """
        token_ids, lengths, ends = padded(prompts)
        num_rows, longest = token_ids.shape
        assert self.joins_prompts and 0 < num_rows <= self.num_slots - first_slot, (num_rows, first_slot)
        assert lengths.min() > 0 and longest <= self.capacity, (lengths, self.capacity)
        logits = np.empty((num_rows, self.vocab_size), np.float32)
        binding = self._bind(first_slot, num_rows)
        # As long as the new tokens: nobody has a past.
        binding.input(self._names[Role.TOTAL_LENGTH], np.array(longest, np.int32))
        binding.input(self._names[Role.TOKEN_IDS], token_ids)
        binding.input(self._names[Role.LENGTHS], lengths)
        binding.input(self._names[Role.LOGITS_INDEX], ends)
        binding.output(self._names[Role.LOGITS], logits)
        started = time.perf_counter()
        binding.run()
        if self.observer is not None:
            self.observer("prefill", prompts_work([len(prompt) for prompt in prompts]), time.perf_counter() - started)
        return logits

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
        started = time.perf_counter()
        binding.run()
        if self.observer is not None and not every_position:  # logits of every position are what no request costs
            self.observer("prefill", prefill_work(start, num_tokens), time.perf_counter() - started)
        self._keep({slot: end})
        return logits

    def copy(self, source: int, destination: int, length: int) -> None:
        """Copy the states of a sequence of `length` positions from slot to slot."""
        self._source_lengths[destination] = self._source_lengths[source]
        for pool in self.pools:
            pool.copy(source, destination, length)

    def release(self, slot: int) -> None:
        """Give the memory of a slot back to the system."""
        for pool in self.pools:
            pool.release(slot)

    def _bind(self, first_slot: int, num_rows: int) -> Binding:
        binding = Binding(self._session)
        rows = slice(first_slot, first_slot + num_rows)
        if (name := self._names.get(Role.TOTAL_LENGTH)) is not None:
            binding.input(name, self._total_length)
        if (name := self._names.get(Role.SOURCE_LENGTHS)) is not None:
            binding.input(name, self._source_lengths[rows])
        for pool in self.pools:
            # Where past and present are one address, the graph writes in place.
            binding.input(pool.spec.input, pool.array[rows])
            if pool.spec.output is not None:
                binding.output(pool.spec.output, pool.present(rows))
        return binding

    def _keep(self, lengths: Mapping[int, int]) -> None:
        """Accept what a step did for some slots, which now hold so many positions."""
        for pool in self._other_pools:
            pool.commit([*lengths])
            for slot, length in lengths.items():
                pool.trim(slot, length)


def step_spec(manifest: Manifest) -> GraphSpec:
    """Return a bundle's step graph.

    Raises:
        BundleRefused: there is none, or it takes what this build does not know.
    """
    graph = manifest.graph(GraphKind.STEP)
    if graph is None:
        raise BundleRefused("it has no step graph")
    roles = {tensor.role for tensor in graph.inputs}
    if unknown := sorted(roles - _INPUTS):
        raise BundleRefused(f"its step graph takes {unknown}: this build knows {', '.join(sorted(_INPUTS))}")
    if missing := sorted({Role.TOKEN_IDS, Role.LENGTHS, Role.LOGITS_INDEX} - roles):
        raise BundleRefused(f"its step graph does not take {', '.join(missing)}")
    return graph


def vocab_size(manifest: Manifest, graph: GraphSpec) -> int:
    """Return how many logits a row has.

    Raises:
        BundleRefused: not as many as the vocabulary has tokens.
    """
    assert manifest.vocabulary is not None, "the schema demands a vocabulary of a generating bundle"
    size, logits = manifest.vocabulary.size, graph.output(Role.LOGITS)
    if logits is None or logits.axes[-1] != size:
        raise BundleRefused(f"the vocabulary has {size} tokens, the logits are {logits and logits.axes}")
    return size
