"""The encode graph of a bundle that generates about a source: sources in, what a sequence begins with out.

Not thread-safe. Axes: rows B, source positions S, channels C, image height H, image width W.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import GraphKind, ImageInput, Role
from service.bundle import BundleRefused, FoundBundle
from service.engine.runtime import create_session
from service.scheduling.request import Source

Array = NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Made:
    """What was made of one source: states by the names of the graph's outputs, and how many positions are real."""

    states: Mapping[str, Array]
    source_length: int


class SourceGraph:
    """Runs sources of one bundle together.

    Args:
        found: a bundle whose files were verified, with an encode graph.

    Raises:
        BundleRefused: the graph is not as the manifest says, or takes what this build does not know.
    """

    def __init__(self, found: FoundBundle) -> None:
        graph = found.manifest.graph(GraphKind.ENCODE)
        assert graph is not None, "the caller looks whether there is one"
        self._inputs = {tensor.role: tensor for tensor in graph.inputs}
        self._outputs = [tensor.name for tensor in graph.outputs if tensor.role is Role.STATE]
        if not self._inputs.keys() <= {Role.SOURCE_IDS, Role.SOURCE_LENGTHS, Role.IMAGE}:
            raise BundleRefused(
                f"its encode graph takes {sorted(self._inputs)}: this build knows source_ids, source_lengths and image"
            )
        self._image = found.manifest.image
        self._session = create_session(found.directory, graph)

    def run(self, sources: Sequence[Source]) -> list[Made]:
        """Return what is made of each source; the bits do not depend on the others."""
        assert sources, "no sources: ONNX Runtime would not survive it"
        lengths = [len(source.token_ids) for source in sources]
        feed: dict[str, Array] = {}
        for role, tensor in self._inputs.items():
            if role is Role.SOURCE_IDS:
                feed[tensor.name] = self._padded(sources, tensor.axes[1])
            elif role is Role.SOURCE_LENGTHS:
                feed[tensor.name] = np.array(lengths, np.int32)
            else:
                feed[tensor.name] = np.stack([self._pixels(source, self._image) for source in sources])
        outputs = self._session.run(self._outputs, feed)
        return [
            Made({name: array[row] for name, array in zip(self._outputs, outputs, strict=True)}, length)
            for row, length in enumerate(lengths)
        ]

    @staticmethod
    def _padded(sources: Sequence[Source], axis: int | str) -> Array:
        """Return the tokens [B, S], S being the longest source or what the graph was made for."""
        width = axis if isinstance(axis, int) else max(len(source.token_ids) for source in sources)
        token_ids = np.zeros((len(sources), width), np.int64)
        for row, source in enumerate(sources):
            token_ids[row, : len(source.token_ids)] = source.token_ids
        return token_ids

    @staticmethod
    def _pixels(source: Source, image: ImageInput | None) -> Array:
        assert image is not None, "the schema demands it of a graph that takes images"
        return np.frombuffer(source.pixels, np.float32).reshape(image.channels, image.height, image.width)
