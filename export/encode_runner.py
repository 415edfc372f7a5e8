"""Runs an encode graph in ONNX Runtime, to certify it and to record its golden run; the service has its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.runner import NUM_THREADS

Tokens = NDArray[np.int64]
Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A text [S]: which text of a pair each token belongs to, and at which places logits are wanted."""

    token_ids: Tokens
    segment_ids: Tokens
    places: Tokens

    @classmethod
    def of(cls, token_ids: Tokens, *, is_pair: bool) -> "Row":
        """Return a row whose second half is another text if it is a pair; every third place is wanted."""
        length = len(token_ids)
        segment_ids = (np.arange(length) >= (length + 1) // 2) & is_pair
        return cls(token_ids=token_ids, segment_ids=segment_ids.astype(np.int64), places=np.arange(0, length, 3))


class EncodeRunner:
    """A session of one encode graph."""

    def __init__(self, graph: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = NUM_THREADS
        # PyTorch runs in between: threads that spin after each run would take its cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._names = {tensor.name for tensor in self._session.get_inputs()}

    def __call__(self, rows: Sequence[Row]) -> list[Array]:
        """Run texts together and return what comes of each: [S, E] of its tokens, [P, V] of its places, or [C]."""
        lengths = np.array([len(row.token_ids) for row in rows], np.int32)
        width = int(lengths.max())
        token_ids, segment_ids = np.zeros((2, len(rows), width), np.int64)
        for index, row in enumerate(rows):
            token_ids[index, : lengths[index]] = row.token_ids
            segment_ids[index, : lengths[index]] = row.segment_ids
        feed = {
            "token_ids": token_ids,
            "lengths": lengths,
            "segment_ids": segment_ids,
            "logits_index": np.concatenate([index * width + row.places for index, row in enumerate(rows)]),
        }
        (output,) = self._session.run(None, {name: feed[name] for name in self._names})
        if "logits_index" in self._names:
            return np.split(output, np.cumsum([len(row.places) for row in rows])[:-1])
        if output.ndim == 2:
            return list(output)
        return [output[index, :length] for index, length in enumerate(lengths)]

    def images(self, images: Array) -> Array:
        """Run images [B, C, Y, X] together and return their logits [B, classes]."""
        return self._session.run(None, {"image": images})[0]
