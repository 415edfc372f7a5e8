"""The encode graph: texts or images in, what the model made of each out. Not thread-safe.

Axes: rows B, tokens S, places P whose logits are wanted, width or number of classes E.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import LOGIT_ROWS, ROWS, TOKENS, GraphKind, Role
from service.bundle import BundleRefused, FoundBundle
from service.engine.runtime import create_session
from service.scheduling.work import Phase, Work, encode_work

Array = NDArray[np.float32]

_TEXT = {Role.TOKEN_IDS, Role.LENGTHS}
_OPTIONAL = {Role.SEGMENT_IDS, Role.LOGITS_INDEX}


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One text, or one image [channels, height, width], to be run.

    `length` is in tokens, for an image in places that it becomes. `segment_ids`, one for each token, are 0 throughout
    where None; `places` are the positions in the text whose logits are wanted, of a graph that asks.
    """

    length: int
    token_ids: Sequence[int] = ()
    segment_ids: Sequence[int] | None = None
    places: Sequence[int] = ()
    image: Array | None = None


class EncodeGraph:
    """Runs texts or images of one bundle together.

    `observer`, if any, is told of every run: its phase, its work, its seconds.

    Args:
        found: a bundle whose files were verified.

    Raises:
        BundleRefused: it has no such graph, or one that is not as the manifest says.
    """

    def __init__(self, found: FoundBundle) -> None:
        graph = found.manifest.graph(GraphKind.ENCODE)
        if graph is None:
            raise BundleRefused("it has no encode graph")
        self._inputs = {tensor.role: tensor.name for tensor in graph.inputs}
        roles = [tensor.role for tensor in graph.outputs]
        is_known = set(self._inputs) == {Role.IMAGE} or set(self._inputs) - _OPTIONAL == _TEXT
        if not is_known or roles not in ([Role.HIDDEN], [Role.LOGITS]):
            taken = sorted((*self._inputs, *roles))
            raise BundleRefused(f"its encode graph has the tensors {taken}, which this build does not serve")
        (self._output,) = graph.outputs
        axes = self._output.axes[:-1]
        if axes not in ((ROWS,), (ROWS, TOKENS), (LOGIT_ROWS,)) or (LOGIT_ROWS in axes) != self.wants_places:
            raise BundleRefused(
                f"{self._output.name} has the axes {self._output.axes}, which this build does not serve"
            )
        self._axes = axes
        self.observer: Callable[[Phase, Work, float], object] | None = None
        self._session = create_session(found.directory, graph)

    @property
    def takes_images(self) -> bool:
        """Whether items are images, and not texts."""
        return Role.IMAGE in self._inputs

    @property
    def wants_places(self) -> bool:
        """Whether items say at which places logits are wanted."""
        return Role.LOGITS_INDEX in self._inputs

    @property
    def output_role(self) -> Role:
        """What comes out: hidden vectors or logits."""
        return self._output.role

    def run(self, items: Sequence[Item]) -> list[Array]:
        """Run items and return what came of each: [S, E] of its own tokens, [P, E] of its places, or [E].

        The bits of an item's result depend neither on the other items nor on how far it was padded.
        """
        assert items, "no items: ONNX Runtime would not survive it"
        feed = {self._inputs[role]: array for role, array in self._feed(items).items()}
        started = time.perf_counter()
        (output,) = self._session.run([self._output.name], feed)
        if self.observer is not None:
            work = encode_work(len(items), max(item.length for item in items))
            self.observer("encode", work, time.perf_counter() - started)
        if self._axes == (ROWS,):
            return list(output)
        if self._axes == (ROWS, TOKENS):
            return [output[row, : item.length] for row, item in enumerate(items)]
        return np.split(output, np.cumsum([len(item.places) for item in items])[:-1])

    def _feed(self, items: Sequence[Item]) -> dict[Role, NDArray[Any]]:
        if self.takes_images:
            return {Role.IMAGE: np.stack([item.image for item in items if item.image is not None])}
        assert all(item.token_ids for item in items), "a text without tokens: ONNX Runtime would not survive it"
        lengths = np.array([item.length for item in items], np.int32)
        shape = (len(items), int(lengths.max()))
        token_ids, segment_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, item in enumerate(items):
            token_ids[row, : item.length] = item.token_ids
            if item.segment_ids is not None:
                segment_ids[row, : item.length] = item.segment_ids
        feed: dict[Role, NDArray[Any]] = {Role.TOKEN_IDS: token_ids, Role.LENGTHS: lengths}
        if Role.SEGMENT_IDS in self._inputs:
            feed[Role.SEGMENT_IDS] = segment_ids
        if self.wants_places:
            assert all(item.places for item in items), "a text of which nothing is wanted"
            index = [row * shape[1] + place for row, item in enumerate(items) for place in item.places]
            feed[Role.LOGITS_INDEX] = np.array(index, np.int64)
        return feed
