"""Chooses tokens where the logits are: only token ids, and log-probabilities if asked for, come back.

The bundle's sample graphs follow the rules of the host's `Sampler`: one without filters, one with, each run once for
all rows of a step. Where a draw falls behind the tokens that the graph ranks, the row comes to the host, whose sampler
then chooses. What rows want is uploaded when it has changed.

Axes: rows B, vocabulary V, adjustments A.
"""

from collections.abc import Sequence

import numpy as np

from attendant.bundle import NOT_FINITE, NOT_RANKED, DType, GraphKind, GraphSpec, Role
from service.bundle import BundleRefused, FoundBundle
from service.engine.adjustments import Adjustments, adjusts
from service.engine.binding import Binding
from service.engine.captures import EAGER, captured_ids, run_options, turn, warm_up
from service.engine.device import Buffer, Device
from service.engine.mirrors import Arriving, Mirror, Room
from service.engine.runtime import create_session
from service.engine.sampling import NotFinite, Sampler, uniforms
from service.scheduling.plan import Sample
from service.scheduling.request import Request, SamplingParams, Token
from service.scheduling.row_buckets import bucket_of

Outcome = Token | NotFinite | None
"""A token; why there is none; or nothing, where none was wanted of a row."""

_REQUEST = {Role.INVERSE_TEMPERATURE: DType.FLOAT32, Role.UNIFORM: DType.FLOAT64}
_FILTERS = {Role.TOP_K: DType.INT64, Role.TOP_P: DType.FLOAT64, Role.MIN_P: DType.FLOAT32}
_KEEPS_ALL = (0, 1.0, 0.0)
_SAMPLE_GRAPHS = (GraphKind.SAMPLE, GraphKind.SAMPLE_FILTERED)


class DeviceSampler:
    """Chooses a token from each of the first rows of a device's logits. Not thread-safe.

    Args:
        found: a bundle whose files were verified.
        logits: float32 [rows, V] on the device, where a step leaves them.
        buckets: how many rows at a time are common, each captured by `capture`.

    Raises:
        BundleRefused: the bundle has no graphs to sample with, or they do not fit.
        DeviceError: the device has not enough memory.
    """

    def __init__(self, found: FoundBundle, logits: Buffer, buckets: Sequence[int] = ()) -> None:
        self._logits, self._device = logits, logits.device
        self._max_rows, vocab_size = logits.shape
        self._buckets = tuple(buckets)
        captures = bool(buckets)
        self._choosers = {kind: _Graph(found, kind, self._device, captures=captures) for kind in _SAMPLE_GRAPHS}
        self._teller = _Graph(found, GraphKind.LOGPROBS, self._device, captures=False)
        self._host = Sampler(vocab_size)
        self._row = self._device.host_array((1, vocab_size), DType.FLOAT32)
        wanted = {**_REQUEST, **_FILTERS}
        self._wanted = {role: Mirror(self._device, (self._max_rows,), dtype) for role, dtype in wanted.items()}
        self._choices = Arriving(self._device, (self._max_rows,), DType.INT64)
        self._told = {
            tensor.role: Arriving(self._device, _shape(tensor.axes, self._max_rows), tensor.dtype)
            for tensor in self._teller.spec.outputs
        }
        self._rooms: dict[int, Room] = {}
        self._adjustments: dict[str, Adjustments] = {}
        self._ids: dict[int, int] = {}
        self._options = {graph_id: run_options(graph_id) for graph_id in (EAGER, *captured_ids(buckets).values())}
        self._samples: Sequence[Sample | None] = ()
        self._requests: list[Request | None] = []  # whose wishes are on the device
        self._seeds = np.zeros(0, np.uint64)
        self._draws = np.zeros(0, np.bool_)
        self._is_filtered = False

    def choose(self, samples: Sequence[Sample | None]) -> list[Outcome]:
        """Choose for rows [0, len(samples)) of the logits, and wait for the outcomes.

        Where nothing is wanted of any row, none is looked at.
        """
        self.launch(samples)
        return self.collect()

    def launch(self, samples: Sequence[Sample | None]) -> None:
        """Have the device choose, after what it was asked before."""
        self._samples = samples
        requests = [None if sample is None else sample.request for sample in samples]
        if not any(requests):
            return
        num_rows = bucket_of(len(samples), self._buckets)  # few sizes, so that few are prepared
        if requests != self._requests:
            self._describe(requests)
        if self._draws.any():
            positions = [0 if sample is None else sample.position for sample in samples]
            self._wanted[Role.UNIFORM].write(uniforms(self._seeds, positions) * self._draws)
        room = self._adjust(samples)
        kind = GraphKind.SAMPLE_FILTERED if self._is_filtered else GraphKind.SAMPLE
        self._run(kind, num_rows, room, self._ids.get(num_rows, EAGER) if room.size == 1 else EAGER)
        self._choices.download(len(samples))
        if any(request.logprobs for request in requests if request is not None):
            self._tell(num_rows, len(samples))

    def collect(self) -> list[Outcome]:
        """Wait for what was launched and return its outcomes; before that, the logits must stay as they were."""
        samples, self._samples = self._samples, ()
        if not any(samples):
            return [None] * len(samples)
        self._device.synchronize()
        choices = self._choices.array[: len(samples)].tolist()
        return [
            Token(choice)
            if choice >= 0 and sample is not None and not sample.request.logprobs
            else self._outcome(row, choice, sample)
            for row, (choice, sample) in enumerate(zip(choices, samples, strict=True))
        ]

    def capture(self) -> None:
        """Capture the runs of every bucket in which no logits are adjusted, on the thread that is to choose."""
        with self._device.turns.together():
            room = self._room(1)
        for kind in _SAMPLE_GRAPHS:
            for num_rows, graph_id in warm_up(self._buckets):
                with turn(self._device, graph_id):
                    self._run(kind, num_rows, room, graph_id)
                    self._device.synchronize()
        self._ids = captured_ids(self._buckets)

    def _run(self, kind: GraphKind, num_rows: int, room: Room, graph_id: int) -> None:
        graph = self._choosers[kind]
        binding = graph.bindings.get((num_rows, room.size))
        if binding is None:
            binding = graph.bindings[num_rows, room.size] = Binding(graph.session)
            given = {Role.LOGITS: self._logits, **{role: mirror.buffer for role, mirror in self._wanted.items()}}
            given |= {role: mirror.buffer for role, mirror in room.mirrors.items()}
            for tensor in graph.spec.inputs:
                binding.input(tensor.name, given[tensor.role][:num_rows])
            binding.output(graph.spec.outputs[0].name, self._choices.buffer[:num_rows])
        binding.run(self._options[graph_id])

    def _tell(self, num_rows: int, num_wanted: int) -> None:
        binding = self._teller.bindings.get((num_rows, 1))
        if binding is None:
            binding = self._teller.bindings[num_rows, 1] = Binding(self._teller.session)
            given = {Role.LOGITS: self._logits, Role.CHOICES: self._choices.buffer}
            for tensor in self._teller.spec.inputs:
                binding.input(tensor.name, given[tensor.role][:num_rows])
            for tensor in self._teller.spec.outputs:
                binding.output(tensor.name, self._told[tensor.role].buffer[:num_rows])
        binding.run(self._options[EAGER])
        for arriving in self._told.values():
            arriving.download(num_wanted)

    def _describe(self, requests: list[Request | None]) -> None:
        """Say what each row wants; who wants nothing is greedy, and needs no number."""
        self._requests = requests
        params = [None if request is None else request.sampling for request in requests]
        drawn = [each if each is not None and not each.is_greedy else None for each in params]
        self._draws = np.array([each is not None for each in drawn])
        self._seeds = np.array([0 if each is None else each.seed for each in drawn], np.uint64)
        inverse = [0.0 if each is None else 1.0 / each.temperature for each in drawn]
        self._wanted[Role.INVERSE_TEMPERATURE].write(inverse)
        self._is_filtered = any(_filters(each, self._logits.shape[1]) for each in drawn if each is not None)
        if self._is_filtered:
            wanted = [(each.top_k, each.top_p, each.min_p) if each else _KEEPS_ALL for each in params]
            for role, values in zip(_FILTERS, zip(*wanted, strict=True), strict=True):
                self._wanted[role].write(values)

    def _adjust(self, samples: Sequence[Sample | None]) -> Room:
        """Say which logits change, in the smallest room that is enough for each row."""
        before, self._adjustments = self._adjustments, {}
        rows: list[Adjustments | None] = [None] * len(samples)
        for row, sample in enumerate(samples):
            if sample is not None and adjusts(sample):
                known = before.get(sample.request.request_id)
                if known is None or not known.continues_with(sample):
                    known = Adjustments(sample.request)
                known.advance(sample)
                rows[row] = self._adjustments[sample.request.request_id] = known
        room = self._room(max((each.size for each in rows if each is not None), default=1))
        room.write(rows)
        return room

    def _room(self, size: int) -> Room:
        size = 1 << (size - 1).bit_length()
        if size not in self._rooms:
            self._rooms[size] = Room(self._device, self._max_rows, size)
        return self._rooms[size]

    def _outcome(self, row: int, choice: int, sample: Sample | None) -> Outcome:
        if choice == NOT_FINITE:
            return NotFinite("the logits are not finite")
        if sample is None:
            return None
        if choice == NOT_RANKED:
            return self._choose_on_host(row, sample)
        request = sample.request
        ids, logprobs = (self._told[role].array[row] for role in (Role.TOP_IDS, Role.TOP_LOGPROBS))
        top = zip(ids[: request.top_logprobs].tolist(), logprobs[: request.top_logprobs].tolist(), strict=True)
        return Token(choice, float(self._told[Role.LOGPROBS].array[row]), tuple(top))

    def _choose_on_host(self, row: int, sample: Sample) -> Token:
        self._device.download(self._logits[row : row + 1], self._row)
        self._device.synchronize()
        return self._host.choose(self._row[0], int(self._row[0].argmax()), sample)


class _Graph:
    """One of the bundle's graphs: what the manifest says, the session, and what was bound, by rows and adjustments."""

    def __init__(self, found: FoundBundle, kind: GraphKind, device: Device, *, captures: bool) -> None:
        spec = found.manifest.graph(kind)
        if spec is None:
            raise BundleRefused(f"it has no {kind} graph: export it again for the target 'cuda'")
        self.spec: GraphSpec = spec
        self.session = create_session(found.directory, spec, device, captures=captures)
        self.bindings: dict[tuple[int, int], Binding] = {}


def _filters(params: SamplingParams, vocab_size: int) -> bool:
    return 0 < params.top_k < vocab_size or params.top_p < 1.0 or params.min_p > 0.0


def _shape(axes: Sequence[int | str], num_rows: int) -> tuple[int, ...]:
    return tuple(num_rows if isinstance(axis, str) else axis for axis in axes)
