"""What an encoder's bundle must show on this processor before it serves: golden replay and bitwise invariance."""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import Check, Manifest
from attendant.processor import processor_features
from service.bundle import BundleRefused, FoundBundle
from service.engine.agreement import relative_error
from service.engine.encode_graph import Array, EncodeGraph, Item
from service.engine.self_test import read_golden


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


def golden_items(found: FoundBundle, graph: EncodeGraph) -> list[Item]:
    """Return the items of a bundle's golden run.

    Raises:
        BundleRefused: the file cannot be read.
    """
    return _items(read_golden(found, found.manifest.golden), graph, found.manifest)


def _checks(found: FoundBundle, graph: EncodeGraph) -> Iterator[Check]:
    golden = found.manifest.golden
    arrays = read_golden(found, golden)
    items = _items(arrays, graph, found.manifest)
    expected = np.asarray(arrays[graph.output_role.value], np.float32)
    alone = [np.atleast_2d(graph.run([item])[0]) for item in items]
    measured = np.concatenate(alone)
    kind = "images" if graph.takes_images else "texts"
    lengths = [item.length for item in items]
    grid = f"{len(items)} {kind} of {sorted(set(lengths))} tokens"
    if golden.bitwise and set(golden.bitwise_on) == set(processor_features()):
        differing = float((measured != expected).sum())
        yield Check(name="golden replay", measured=differing, bound=0.0, grid=grid)
    elif golden.bitwise:  # integer kernels of another processor: rounding flips move single values
        cuts = np.cumsum([len(rows) for rows in alone])[:-1]
        error = 1 - min(map(_cosine, alone, np.split(expected, cuts)))
        bound = golden.cosine_bound or golden.bound
        yield Check(name="golden replay, 1 - cosine of mean vectors", measured=error, bound=bound, grid=grid)
    else:
        error = relative_error(measured, expected)
        yield Check(name="golden replay", measured=error, bound=golden.bound, grid=grid)
    together = np.concatenate([np.atleast_2d(result) for result in graph.run(items)])
    yield Check(
        name=f"bits that differ between one of the {kind} alone and among others",
        measured=float((together != measured).sum()),
        bound=0.0,
        grid=f"{grid}, padded to {max(lengths)}",
    )


def _items(arrays: Mapping[str, NDArray[np.generic]], graph: EncodeGraph, manifest: Manifest) -> list[Item]:
    """Return the golden run's items; see docs/bundle.md for the arrays."""
    if graph.takes_images:
        length = manifest.limits.max_model_len
        return [Item(length=length, image=image.astype(np.float32)) for image in np.asarray(arrays["image"])]
    lengths = [int(length) for length in arrays["lengths"]]
    token_ids = _split(arrays["token_ids"], lengths)
    segment_ids = _split(arrays["segment_ids"], lengths) if "segment_ids" in arrays else [None] * len(lengths)
    num_places = [int(number) for number in arrays["num_places"]] if graph.wants_places else [0] * len(lengths)
    places = _split(arrays["places"], num_places) if graph.wants_places else [[]] * len(lengths)
    return [
        Item(length=length, token_ids=tokens, segment_ids=segments, places=wanted)
        for length, tokens, segments, wanted in zip(lengths, token_ids, segment_ids, places, strict=True)
    ]


def _split(values: NDArray[np.generic], lengths: list[int]) -> list[list[int]]:
    return [[int(value) for value in piece] for piece in np.split(values, np.cumsum(lengths)[:-1])]


def _cosine(vectors: Array, others: Array) -> float:
    ours, theirs = vectors.mean(axis=0, dtype=np.float64), others.mean(axis=0, dtype=np.float64)
    return float(ours @ theirs / np.sqrt((ours @ ours) * (theirs @ theirs)))
