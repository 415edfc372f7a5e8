"""The step graph of a bundle with everything it touches on a device: states, tokens, lengths, and the logits it makes.

Nothing here waits for the device, and nothing is brought back: a run says in which rows of `logits` its answers will
be. Whoever chooses tokens reads them there. `DownloadedGraph` is for those who want to look at logits themselves.

It keeps the rules of step_graph.py, and needs less of a bundle: states that are appended to, and no sources. Every slot
has its full capacity from the start.

Axes: rows B, new tokens T, slots S, vocabulary V.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from attendant.bundle import CAPACITY, DType, GraphKind, Manifest, Role, StateRule, StateSpec
from service.bundle import BundleRefused, FoundBundle
from service.engine.binding import Binding
from service.engine.captures import EAGER, captured_ids, run_options, turn, warm_up
from service.engine.device import Array, Buffer, Device, DeviceError
from service.engine.graph import Logits, padded
from service.engine.pools import position_bytes
from service.engine.runtime import create_session
from service.engine.source_graph import Made
from service.engine.step_graph import step_spec, vocab_size
from service.scheduling.work import Phase, Work, decode_work, prefill_work, prompts_work

_TOLERANCE = 0.05
"""How far a replayed run's logits may be from those of an eager one, in units of the largest: far less than a run that
reads a frozen length or token is off, far more than half types round."""


class DeviceGraph:
    """Runs decode rows, prompts and chunks of one bundle on its states on a device. Not thread-safe.

    Args:
        found: a bundle whose files were verified.
        num_slots: S.
        capacity: positions of one slot.
        device: where everything lies.
        buckets: how many rows decode runs from slot 0 have; `capture` captures each of them.

    Raises:
        BundleRefused: the graph does not fit the manifest, or needs what is not served on a device.
        DeviceError: the device has not enough memory.
    """

    sources = None
    rewinds = True

    def __init__(
        self, found: FoundBundle, num_slots: int, capacity: int, device: Device, buckets: Sequence[int] = ()
    ) -> None:
        manifest = found.manifest
        graph = step_spec(manifest)
        _require_served(manifest)
        self.device = device
        self.prefill_chunk = manifest.limits.prefill_chunk
        self.num_slots = num_slots
        self.capacity = capacity
        self.vocab_size = vocab_size(manifest, graph)
        self._session = create_session(found.directory, graph, device, captures=bool(buckets))
        self._names = {tensor.role: tensor.name for tensor in (*graph.inputs, *graph.outputs)}
        self._pools = [_Pool(state, num_slots, capacity, device) for state in manifest.states]
        # Lies in the host's memory, and is frozen in what is captured: it never changes there.
        self._total_length = np.array(capacity, np.int32)
        self._token_ids = device.allocate((num_slots, 1), DType.INT64)
        self._lengths = device.allocate((num_slots,), DType.INT32)
        self._logits_index = device.allocate((num_slots,), DType.INT64)
        device.upload(np.arange(num_slots, dtype=np.int64), self._logits_index)
        # What is read beside the decode rows, run after run.
        self._read_ids = device.allocate((capacity,), DType.INT64)
        self._read_lengths = device.allocate((num_slots,), DType.INT32)
        self._read_index = device.allocate((num_slots,), DType.INT64)
        # A step has at most a decode row and a prompt of each slot.
        self.logits = device.allocate((2 * num_slots, self.vocab_size), DType.FLOAT32)
        self._num_rows = 0
        self._buckets = tuple(buckets)
        self._ids: dict[int, int] = {}
        self._options = {graph_id: run_options(graph_id) for graph_id in (EAGER, *captured_ids(buckets).values())}
        self._decode_runs: dict[tuple[int, int], _DecodeRun] = {}
        self._slot_bindings: dict[int, Binding] = {}

    @property
    def joins_prompts(self) -> bool:
        """Whether prompts may be read together."""
        return self.prefill_chunk is None and Role.TOTAL_LENGTH in self._names

    def take(self) -> range:
        """Return the rows of `logits` that were written since this was last asked; the next run writes from row 0."""
        rows, self._num_rows = range(self._num_rows), 0
        return rows

    def begin(self, slot: int, made: Made | None = None) -> None:
        """Begin a sequence in a slot: it has nothing to remember yet."""
        assert made is None, slot

    def decode(
        self,
        token_ids: Sequence[int],
        lengths: Sequence[int],
        real: Sequence[int] | None = None,
        first_slot: int = 0,
    ) -> range:
        """Feed one token to each of B slots in a row; the first run of a step.

        Args:
            token_ids: B tokens.
            lengths: tokens of each row, the new one included, at most the capacity.
            real: of no importance: what a parked row writes is written again.
            first_slot: the slot of row 0.

        Returns:
            The rows of `logits`: the first B, where a captured run has them.
        """
        num_rows = len(token_ids)
        assert 0 < num_rows == len(lengths) <= self.num_slots - first_slot, (num_rows, first_slot, self.num_slots)
        assert min(lengths) > 0 and max(lengths) <= self.capacity, (lengths, self.capacity)
        assert self._num_rows == 0, self._num_rows
        graph_id = EAGER if first_slot else self._ids.get(num_rows, EAGER)
        self._decode(np.array(token_ids, np.int64), np.array(lengths, np.int32), first_slot, graph_id)
        return self._written(range(num_rows))

    def prompts(self, first_slot: int, prompts: Sequence[Sequence[int]]) -> range:
        """Feed whole prompts to as many slots in a row, which have just begun, in one run: only where `joins_prompts`.

        Args:
            first_slot: the slot of the first.
            prompts: B of them.

        Returns:
            The rows of `logits`, of the prompts' ends.
        """
        token_ids, lengths, ends = padded(prompts)
        num_rows, longest = token_ids.shape
        assert self.joins_prompts and 0 < num_rows <= self.num_slots - first_slot, (num_rows, first_slot)
        assert lengths.min() > 0 and longest <= self.capacity, (lengths, self.capacity)
        binding = self._bind(first_slot, num_rows)
        # As long as the new tokens: nobody has a past.
        binding.input(self._names[Role.TOTAL_LENGTH], np.array(longest, np.int32))
        rows = self._rows_for(num_rows)
        self._read(binding, token_ids, lengths, ends, self.logits[rows.start : rows.stop])
        return self._written(rows)

    def chunk(self, slot: int, token_ids: Sequence[int], start: int) -> range:
        """Feed positions [start, start + T) to one slot.

        Args:
            slot: the row of the states.
            token_ids: T tokens, exactly as many as there are.
            start: positions already written.

        Returns:
            The row of `logits`, of the last one.
        """
        rows = self._rows_for(1)
        self._chunk(slot, token_ids, start, np.array([len(token_ids) - 1]), self.logits[rows.start : rows.stop])
        return self._written(rows)

    def copy(self, source: int, destination: int, length: int) -> None:
        """Copy the states of a sequence of `length` positions from slot to slot, on the device."""
        for pool in self._pools:
            pool.copy(source, destination, length)

    def release(self, slot: int) -> None:
        """Do nothing: a slot keeps its memory."""

    def capture(self) -> None:
        """Capture the decode run of every bucket; all slots must be free.

        CUDA keeps what is captured by thread: call this on the thread that is to decode.

        Raises:
            DeviceError: a captured run answers otherwise than an eager one.
        """
        for num_rows, graph_id in warm_up(self._buckets):
            with turn(self.device, graph_id):
                self._decode(np.zeros(num_rows, np.int64), np.ones(num_rows, np.int32), 0, graph_id)
                self.device.synchronize()
        for num_rows, graph_id in captured_ids(self._buckets).items():
            with self.device.turns.together():
                self._verify(num_rows, graph_id)
        self._ids = captured_ids(self._buckets)

    def _verify(self, num_rows: int, graph_id: int) -> None:
        """Compare a replay with an eager run, on other tokens and lengths than were captured."""
        token_ids = np.arange(1, num_rows + 1, dtype=np.int64) * 7 % self.vocab_size
        lengths = np.full(num_rows, min(2, self.capacity), np.int32)
        answers = []
        for each in (EAGER, graph_id):
            self._decode(token_ids, lengths, 0, each)
            answers.append(self.download(range(num_rows)))
        eager, replayed = answers
        error = float(np.abs(eager - replayed).max()) / float(np.abs(eager).max())
        if not error <= _TOLERANCE:
            raise DeviceError(
                f"the captured run of {num_rows} rows answers otherwise than an eager one: {error:.3g} of the largest "
                f"logit, allowed {_TOLERANCE}"
            )

    def download(self, rows: range) -> Logits:
        """Wait for the device and return some rows of `logits`."""
        array = self.device.host_array((len(rows), self.vocab_size), DType.FLOAT32)
        self.device.download(self.logits[rows.start : rows.stop], array)
        self.device.synchronize()
        return array

    def read_every(self, slot: int, token_ids: Sequence[int], start: int) -> Logits:
        """Feed a chunk, wait for the device, and return the logits [T, V] of all of its positions."""
        logits = self.device.allocate((len(token_ids), self.vocab_size), DType.FLOAT32)
        self._chunk(slot, token_ids, start, np.arange(len(token_ids)), logits)
        array = self.device.host_array(logits.shape, DType.FLOAT32)
        self.device.download(logits, array)
        self.device.synchronize()
        return array

    def _rows_for(self, num_rows: int) -> range:
        rows = range(self._num_rows, self._num_rows + num_rows)
        assert rows.stop <= self.logits.shape[0], (rows, self.logits.shape)
        return rows

    def _written(self, rows: range) -> range:
        """Note that a run has succeeded; what a run leaves that fails is written again."""
        self._num_rows = rows.stop
        return rows

    def _decode(self, token_ids: Array, lengths: Array, first_slot: int, graph_id: int) -> None:
        num_rows = len(token_ids)
        run = self._decode_runs.get((first_slot, num_rows))
        if run is None:
            run = _DecodeRun(self._bind(first_slot, num_rows), self._token_ids[:num_rows], self._lengths[:num_rows])
            run.binding.input(self._names[Role.TOKEN_IDS], run.token_ids)
            run.binding.input(self._names[Role.LENGTHS], run.lengths)
            run.binding.input(self._names[Role.LOGITS_INDEX], self._logits_index[:num_rows])
            run.binding.output(self._names[Role.LOGITS], self.logits[:num_rows])
            self._decode_runs[first_slot, num_rows] = run
        self.device.upload(token_ids, run.token_ids)
        self.device.upload(lengths, run.lengths)
        run.binding.run(self._options[graph_id])

    def _chunk(self, slot: int, token_ids: Sequence[int], start: int, wanted: Array, logits: Buffer) -> None:
        end = start + len(token_ids)
        assert 0 <= slot < self.num_slots and token_ids and start >= 0 and end <= self.capacity, (slot, start, end)
        binding = self._slot_bindings.get(slot)
        if binding is None:
            binding = self._slot_bindings[slot] = self._bind(slot, 1)
        ids, lengths = np.array([token_ids], np.int64), np.array([end], np.int32)
        self._read(binding, ids, lengths, wanted.astype(np.int64), logits)

    def _read(self, binding: Binding, token_ids: Array, lengths: Array, wanted: Array, logits: Buffer) -> None:
        """Run on tokens [B, T]; what an earlier run still reads is overwritten only after it, in the stream."""
        if token_ids.size > self._read_ids.shape[0]:
            self._read_ids = self.device.allocate((token_ids.size,), DType.INT64)
        if wanted.size > self._read_index.shape[0]:
            self._read_index = self.device.allocate((wanted.size,), DType.INT64)
        inputs = (
            (Role.TOKEN_IDS, token_ids, self._read_ids),
            (Role.LENGTHS, lengths, self._read_lengths),
            (Role.LOGITS_INDEX, wanted, self._read_index),
        )
        for role, array, room in inputs:
            buffer = room[: array.size].reshaped(*array.shape)
            self.device.upload(array, buffer)
            binding.input(self._names[role], buffer)
        binding.output(self._names[Role.LOGITS], logits)
        binding.run(self._options[EAGER])

    def _bind(self, first_slot: int, num_rows: int) -> Binding:
        binding = Binding(self._session)
        if (name := self._names.get(Role.TOTAL_LENGTH)) is not None:
            binding.input(name, self._total_length)
        for pool in self._pools:
            # Past and present are one address: the graph writes in place.
            rows = pool.buffer[first_slot : first_slot + num_rows]
            binding.input(pool.spec.input, rows)
            assert pool.spec.output is not None, "the schema demands it of states that are appended to"
            binding.output(pool.spec.output, rows)
        return binding


class DownloadedGraph:
    """A `DeviceGraph` whose logits are brought back run by run, for load-time checks.

    Args:
        graph: what runs.
    """

    sources = None
    rewinds = True

    def __init__(self, graph: DeviceGraph) -> None:
        self.graph = graph
        self.num_slots, self.capacity = graph.num_slots, graph.capacity
        self.vocab_size, self.prefill_chunk = graph.vocab_size, graph.prefill_chunk
        self.joins_prompts = graph.joins_prompts
        self.begin, self.copy, self.release = graph.begin, graph.copy, graph.release
        self.observer: Callable[[Phase, Work, float], object] | None = None

    def decode(
        self,
        token_ids: Sequence[int],
        lengths: Sequence[int],
        real: Sequence[int] | None = None,
        first_slot: int = 0,
    ) -> Logits:
        """Feed one token to each of B slots in a row, and return logits [B, V]."""
        return self._observed(
            "decode", decode_work(lengths), lambda: self.graph.decode(token_ids, lengths, real, first_slot)
        )

    def prompts(self, first_slot: int, prompts: Sequence[Sequence[int]]) -> Logits:
        """Feed whole prompts to as many slots in a row, and return logits [B, V] of their ends."""
        work = prompts_work([len(prompt) for prompt in prompts])
        return self._observed("prefill", work, lambda: self.graph.prompts(first_slot, prompts))

    def chunk(self, slot: int, token_ids: Sequence[int], start: int, *, every_position: bool = False) -> Logits:
        """Feed positions [start, start + T) to one slot, and return logits [1, V], or [T, V]."""
        if every_position:
            with self.graph.device.turns.together():
                return self.graph.read_every(slot, token_ids, start)
        work = prefill_work(start, len(token_ids))
        return self._observed("prefill", work, lambda: self.graph.chunk(slot, token_ids, start))

    def _observed(self, phase: Phase, work: Work, run: Callable[[], range]) -> Logits:
        self.graph.take()  # what a run that failed may have left
        with self.graph.device.turns.together():
            started = time.perf_counter()
            logits = self.graph.download(run())
        if self.observer is not None:
            self.observer(phase, work, time.perf_counter() - started)
        self.graph.take()
        return logits


class _DecodeRun(NamedTuple):
    """What is bound for some decode rows, and where their tokens [B, 1] and lengths [B] are read."""

    binding: Binding
    token_ids: Buffer
    lengths: Buffer


class _Pool:
    """An `append` state of all slots on a device, [S, ..., C, ...]."""

    def __init__(self, spec: StateSpec, num_slots: int, capacity: int, device: Device) -> None:
        shape = tuple(capacity if axis == CAPACITY else int(axis) for axis in spec.axes[1:])
        self.spec = spec
        self.buffer = device.allocate((num_slots, *shape), spec.dtype)
        self._position_bytes = position_bytes(spec)
        self._pitch = capacity * self._position_bytes
        self._num_regions = math.prod(shape[: spec.axes.index(CAPACITY) - 1])

    def copy(self, source: int, destination: int, length: int) -> None:
        """Copy positions [0, length) of one slot to another."""
        self.buffer.device.copy_strided(
            self.buffer[source : source + 1].address,
            self.buffer[destination : destination + 1].address,
            pitch=self._pitch,
            width=length * self._position_bytes,
            height=self._num_regions,
        )


def _require_served(manifest: Manifest) -> None:
    others = sorted({state.rule.value for state in manifest.states if state.rule is not StateRule.APPEND})
    if others or manifest.graph(GraphKind.ENCODE) is not None:
        what = f"states of the rule {', '.join(others)}" if others else "an encode graph"
        raise BundleRefused(f"it has {what}: on a device this build serves what continues texts by appended states")
