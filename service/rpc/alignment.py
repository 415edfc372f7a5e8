"""Where in its source a model looks while it writes: rows of its explain graph, as the answer grows."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import Places, Role
from attendant.v1 import generation_pb2 as pb
from service.bundle import BundleRefused
from service.errors import ExecutionFailed
from service.rpc.catalog import ServedModel
from service.rpc.explain import patch_labels
from service.rpc.workers import TextWorkers
from service.scheduling.request import Request


class Alignment:
    """The alignment of one answer. The graph reads all that was written every time, on a thread of its own.

    Args:
        model: with an explain graph that shows attention to a source.
        request: what is answered.
        runs: where explain graphs run.
    """

    def __init__(self, model: ServedModel, request: Request, runs: TextWorkers) -> None:
        assert request.source is not None, "a model with attention to a source was given one"
        self._model = model
        self._graph = model.explainer
        self._runs = runs
        self._read = list(request.prompt)
        self._source: dict[Role, NDArray[np.generic]] = {}
        if request.source.pixels:
            image = model.found.manifest.image
            assert image is not None, "the schema demands it of a graph that takes images"
            pixels = np.frombuffer(request.source.pixels, np.float32)
            self._source[Role.IMAGE] = pixels.reshape(image.channels, image.height, image.width)
            self.labels = patch_labels(self._graph.told)
        else:
            self._source[Role.SOURCE_IDS] = np.array(request.source.token_ids, np.int64)
            self.labels = [model.source_codec.token_label(token_id) for token_id in request.source.token_ids]

    async def of_next(self, token_ids: Sequence[int]) -> list[pb.TokenAlignment]:
        """Return where the model looked for each of the next tokens.

        Raises:
            ExecutionFailed: the explain graph cannot be run.
        """
        if not token_ids:
            return []
        self._read += token_ids
        read = np.array(self._read[:-1], np.int64)  # the last token was written, and is not read yet
        weights = await self._runs.run(lambda: self._mean(read), accepted=True)
        return [pb.TokenAlignment(weights=row.tolist()) for row in weights[-len(token_ids) :]]

    def _mean(self, read: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the mean weights [tokens, source] over all layers and heads that look at the source."""
        try:
            weights = self._graph.run(self._source | {Role.TOKEN_IDS: read})
        except BundleRefused as error:
            raise ExecutionFailed(f"the explain graph of model {self._model.key} is not fit to run: {error}") from error
        shown = [weights[spec.output] for spec in self._graph.told.weights if spec.rows is Places.WRITTEN]
        mean: NDArray[np.float32] = np.concatenate(shown).mean(axis=0)
        return mean
