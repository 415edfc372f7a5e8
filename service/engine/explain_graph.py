"""The explain graph: one input in, the attention weights of every layer and head out.

It is loaded when it is asked for, on whatever thread asks, and never runs on a thread that serves; when nobody asks for
a while it is let go again. Thread-safe.
Shapes: H heads, R rows, C columns.
"""

import threading
import time
from collections.abc import Mapping

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from attendant.bundle import Explain, GraphKind, GraphSpec, Places, Role
from service.bundle import BundleRefused, FoundBundle
from service.engine.runtime import create_session, element_type
from service.engine.self_test import read_golden

Array = NDArray[np.generic]
Weights = dict[str, NDArray[np.float32]]

IDLE_SECONDS = 300.0
_GOLDEN = "explain."


class ExplainGraph:
    """Runs the explain graph of one bundle, one input at a time.

    Args:
        found: a bundle whose files were verified, with an explain graph.
        idle_seconds: how long the graph stays in memory after it was used.
    """

    def __init__(self, found: FoundBundle, idle_seconds: float = IDLE_SECONDS) -> None:
        graph, told = found.manifest.graph(GraphKind.EXPLAIN), found.manifest.explain
        assert graph is not None and told is not None, "the caller looks whether there is one"
        self.graph: GraphSpec = graph
        self.told: Explain = told
        self._found = found
        self._lock = threading.Lock()
        self._session: ort.InferenceSession | None = None
        self._idle_seconds = idle_seconds
        self._used = 0.0

    @property
    def is_loaded(self) -> bool:
        """Whether it is in memory."""
        return self._session is not None

    @property
    def roles(self) -> frozenset[Role]:
        """What it takes."""
        return frozenset(tensor.role for tensor in self.graph.inputs)

    @property
    def num_heads(self) -> dict[str, int]:
        """How many heads each output has."""
        return {tensor.name: int(tensor.axes[1]) for tensor in self.graph.outputs}

    def run(self, inputs: Mapping[Role, Array]) -> Weights:
        """Return all weights [H, R, C] by the names of outputs. Blocks, the first time for as long as loading takes.

        Args:
            inputs: token ids [tokens], source ids [source] and the image [channels, height, width], as it takes them.

        Raises:
            BundleRefused: the graph cannot be loaded, or does not repeat its golden run.
        """
        with self._lock:
            if self._session is None:
                self._session = self._load()
                self._watch(self._idle_seconds)
            feed, lengths = {}, {}
            for tensor in self.graph.inputs:
                values = np.asarray(inputs[tensor.role], element_type(tensor))
                if tensor.role is not Role.IMAGE:
                    lengths[tensor.role] = len(values)
                    if isinstance(tensor.axes[1], int):  # made for so many tokens; what follows changes nothing before
                        values = np.pad(values, (0, tensor.axes[1] - len(values)))
                feed[tensor.name] = values[None]
            names = [spec.output for spec in self.told.weights]
            found = self._session.run(names, feed)
            self._used = time.monotonic()
        tokens = lengths.get(Role.TOKEN_IDS)
        return {
            spec.output: weights[0, :, : tokens if spec.rows in (Places.TOKENS, Places.WRITTEN) else None]
            for spec, weights in zip(self.told.weights, found, strict=True)
        }

    def _watch(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._release)
        timer.daemon = True
        timer.start()

    def _release(self) -> None:
        """Let the graph go if it was idle for long enough, or else come back when it may be."""
        with self._lock:
            left = self._used + self._idle_seconds - time.monotonic()
            if left <= 0:
                self._session = None
            else:
                self._watch(left)

    def _load(self) -> ort.InferenceSession:
        session = create_session(self._found.directory, self.graph)
        golden = self._found.manifest.golden
        arrays = read_golden(self._found, golden)
        names = [tensor.name for tensor in self.graph.outputs]
        feed = {tensor.name: arrays[_GOLDEN + tensor.name] for tensor in self.graph.inputs}
        found = session.run(names, feed)
        error = max(float(np.abs(ours - arrays[_GOLDEN + name]).max()) for name, ours in zip(names, found, strict=True))
        if not error <= golden.bound:
            raise BundleRefused(f"{self.graph.file}: golden replay: {error:.3g}, allowed {golden.bound:.3g}")
        return session
