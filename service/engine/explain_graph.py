"""The explain graph: one input in, the attention weights of every layer and head out.

It is loaded when it is first asked for, on whatever thread asks, and never runs on a thread that serves. Thread-safe.
Shapes: H heads, R rows, C columns.
"""

import threading
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

_GOLDEN = "explain."


class ExplainGraph:
    """Runs the explain graph of one bundle, one input at a time.

    Args:
        found: a bundle whose files were verified, with an explain graph.
    """

    def __init__(self, found: FoundBundle) -> None:
        graph, told = found.manifest.graph(GraphKind.EXPLAIN), found.manifest.explain
        assert graph is not None and told is not None, "the caller looks whether there is one"
        self.graph: GraphSpec = graph
        self.told: Explain = told
        self._found = found
        self._lock = threading.Lock()
        self._session: ort.InferenceSession | None = None

    @property
    def roles(self) -> frozenset[Role]:
        """What it takes."""
        return frozenset(tensor.role for tensor in self.graph.inputs)

    def cells(self, sizes: Mapping[Places, int]) -> int:
        """Return how many weights a run makes where rows and columns have so many places."""
        heads = {tensor.name: int(tensor.axes[1]) for tensor in self.graph.outputs}
        return sum(heads[spec.output] * sizes[spec.rows] * sizes[spec.columns] for spec in self.told.weights)

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
        tokens = lengths.get(Role.TOKEN_IDS)
        return {
            spec.output: weights[0, :, : tokens if spec.rows in (Places.TOKENS, Places.WRITTEN) else None]
            for spec, weights in zip(self.told.weights, found, strict=True)
        }

    def release(self) -> None:
        """Free what it holds; the next run loads it again."""
        with self._lock:
            self._session = None

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
