"""The encode graph: texts of token ids in, vectors of their tokens out. Not thread-safe.

Axes: rows B, tokens S, width E.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import GraphKind, Role
from service.bundle import BundleRefused, FoundBundle
from service.engine.runtime import create_session

Vectors = NDArray[np.float32]


class EncodeGraph:
    """Runs texts of one bundle together.

    Args:
        found: a bundle whose files were verified.

    Raises:
        BundleRefused: it has no such graph, or one that is not as the manifest says.
    """

    def __init__(self, found: FoundBundle) -> None:
        graph = found.manifest.graph(GraphKind.ENCODE)
        if graph is None:
            raise BundleRefused("it has no encode graph")
        roles = {tensor.role: tensor.name for tensor in (*graph.inputs, *graph.outputs)}
        if set(roles) != {Role.TOKEN_IDS, Role.LENGTHS, Role.HIDDEN}:
            raise BundleRefused(f"its encode graph has the tensors {sorted(roles)}, which this build does not serve")
        self._roles = roles
        self._session = create_session(found.directory, graph)

    def run(self, texts: Sequence[Sequence[int]]) -> list[Vectors]:
        """Encode texts and return the vectors [S, E] of each one's tokens; padding is not among them.

        The bits of a text's vectors depend neither on the other texts nor on how far it was padded.
        """
        assert texts and all(texts), "no texts, or one without tokens: ONNX Runtime would not survive it"
        lengths = np.array([len(text) for text in texts], np.int32)
        token_ids = np.zeros((len(texts), int(lengths.max())), np.int64)
        for row, text in enumerate(texts):
            token_ids[row, : len(text)] = text
        feed = {self._roles[Role.TOKEN_IDS]: token_ids, self._roles[Role.LENGTHS]: lengths}
        (hidden,) = self._session.run([self._roles[Role.HIDDEN]], feed)
        return [hidden[row, :length] for row, length in enumerate(lengths)]
