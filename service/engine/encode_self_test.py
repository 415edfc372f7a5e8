"""What an encoder's bundle must show on this processor before it serves: golden replay and bitwise invariance."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import Check
from attendant.processor import processor_features
from service.bundle import BundleRefused, FoundBundle
from service.engine.encode_graph import EncodeGraph
from service.engine.self_test import read_golden, relative_error

Vectors = NDArray[np.float32]


def check_encoder(found: FoundBundle, graph: EncodeGraph) -> tuple[Check, ...]:
    """Run every load-time check.

    Raises:
        BundleRefused: a check failed; the message says which and by how much.
    """
    checks = tuple(_checks(found, graph))
    for check in checks:
        if not check.passed:
            raise BundleRefused(f"{check.name}: {check.measured:.3g}, allowed {check.bound:.3g} ({check.grid})")
    return checks


def _checks(found: FoundBundle, graph: EncodeGraph) -> Iterator[Check]:
    golden = found.manifest.golden
    arrays = read_golden(found, golden)
    lengths = [int(length) for length in arrays["lengths"]]
    cuts = np.cumsum(lengths)[:-1]
    texts = [[int(token) for token in text] for text in np.split(arrays["token_ids"], cuts)]
    expected = np.asarray(arrays["hidden"], np.float32)
    alone = [graph.run([text])[0] for text in texts]
    measured = np.concatenate(alone)
    grid = f"{len(texts)} texts of {lengths} tokens"
    if golden.bitwise and set(golden.bitwise_on) == set(processor_features()):
        differing = float((measured != expected).sum())
        yield Check(name="golden replay", measured=differing, bound=0.0, grid=grid)
    elif golden.bitwise:  # integer kernels of another processor: rounding flips move single values
        error = 1 - min(map(_cosine, alone, np.split(expected, cuts)))
        bound = golden.cosine_bound or golden.bound
        yield Check(name="golden replay, 1 - cosine of mean vectors", measured=error, bound=bound, grid=grid)
    else:
        error = relative_error(measured, expected)
        yield Check(name="golden replay", measured=error, bound=golden.bound, grid=grid)
    together = np.concatenate(graph.run(texts))
    yield Check(
        name="bits that differ between a text alone and among others",
        measured=float((together != measured).sum()),
        bound=0.0,
        grid=f"{grid}, padded to {max(lengths)}",
    )


def _cosine(vectors: Vectors, others: Vectors) -> float:
    ours, theirs = vectors.mean(axis=0, dtype=np.float64), others.mean(axis=0, dtype=np.float64)
    return float(ours @ theirs / np.sqrt((ours @ ours) * (theirs @ theirs)))
