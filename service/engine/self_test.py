"""What a bundle must show where it runs before it serves: golden replay and invariance.

The golden run (docs/bundle.md) proves that the graphs compute here what they computed for the exporter. The invariance
test proves promise P2 on the actual kernels: a row alone and among others, a prompt at once and in chunks, to the bit
on a CPU and within a tolerance on other devices (`agreement`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import Check, Golden
from attendant.processor import processor_features
from service.bundle import BundleRefused, FoundBundle
from service.engine.agreement import Agreement, relative_error
from service.engine.graph import HostGraph, feed
from service.engine.source_graph import SourceGraph
from service.scheduling.request import Source

_Arrays = Mapping[str, NDArray[np.generic]]


def check_bundle(found: FoundBundle, graph: HostGraph) -> tuple[Check, ...]:
    """Run every load-time check that fits the pools; slots are left free and their memory given back.

    Raises:
        BundleRefused: a check failed; the message says which and by how much.
    """
    golden = found.manifest.golden
    arrays = read_golden(found, golden)
    checks = [*_replay(golden, arrays, graph), *_invariance(Agreement.of(found.manifest), arrays, graph)]
    for slot in range(graph.num_slots):
        graph.release(slot)
    for check in checks:
        if not check.passed:
            raise BundleRefused(f"{check.name}: {check.measured:.3g}, allowed {check.bound:.3g} ({check.grid})")
    return tuple(checks)


def read_golden(found: FoundBundle, golden: Golden) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of a bundle's golden run.

    Raises:
        BundleRefused: the file cannot be read.
    """
    try:
        with np.load(found.directory / golden.file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise BundleRefused(f"{golden.file} cannot be read: {error}") from error


def golden_prompt(found: FoundBundle) -> tuple[list[int], Source | None]:
    """Return the prompt of a bundle's golden run, and the source that it is about if it has one.

    Raises:
        BundleRefused: the file cannot be read.
    """
    arrays = read_golden(found, found.manifest.golden)
    return _ids(arrays["prompt"]), _source(arrays)


def _replay(golden: Golden, arrays: _Arrays, graph: HostGraph) -> list[Check]:
    bitwise = golden.bitwise and set(golden.bitwise_on) == set(processor_features())
    text = _ids(arrays["text"])[: graph.capacity]
    _begin(graph, 0, _source(arrays))
    logits = feed(graph, 0, text, every_position=True)
    likelihood = mean_log_likelihood(logits[:-1], text[1:])
    assert golden.log_likelihood_bound is not None, "the schema demands one of a generating bundle"
    difference = abs(likelihood - float(arrays["text_log_likelihood"]))
    checks = [
        Check(
            name="golden text log-likelihood",
            measured=difference if np.isfinite(difference) else float("inf"),
            bound=golden.log_likelihood_bound,
            grid=f"{len(text)} tokens",
        )
    ]
    if golden.bitwise and not bitwise:
        return checks  # integer kernels of another processor: rounding flips move single logits by several units
    prompt = _ids(arrays["prompt"])
    runs = [(_one_pass(graph, prompt, arrays), arrays["prompt_logits"], f"prompt of {len(prompt)} tokens")]
    ragged = _ragged(graph, arrays)
    if ragged is not None:
        runs.append((ragged, arrays["ragged_logits"], f"ragged decode {arrays['ragged_logits'].shape[:2]}"))
    for measured, expected, grid in runs:
        expected32 = np.asarray(expected, np.float32)
        if bitwise:
            error, bound = float((measured != expected32).sum()), 0.0
        else:
            error, bound = relative_error(measured, expected32), golden.bound
        checks.append(Check(name="golden replay", measured=error, bound=bound, grid=grid))
    return checks


def mean_log_likelihood(logits: NDArray[np.float32], targets: Sequence[int]) -> float:
    """Return the mean natural log-probability of `targets` [N] under `logits` [N, V]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    chosen = wide[np.arange(len(targets)), np.asarray(targets)]
    return float((chosen - np.log(np.exp(wide).sum(axis=1))).mean())


def _ids(array: NDArray[np.generic]) -> list[int]:
    return [int(token) for token in array]


def _source(arrays: _Arrays) -> Source | None:
    """Return the source that the golden prompt and text are about."""
    return _sources([arrays["source"]])[0] if "source" in arrays else None


def _ragged_sources(arrays: _Arrays) -> list[Source] | None:
    if "ragged_sources" not in arrays:
        return None
    sources = arrays["ragged_sources"]
    if "ragged_source_lengths" not in arrays:
        return _sources(sources)
    return _sources([row[:length] for row, length in zip(sources, arrays["ragged_source_lengths"], strict=True)])


def _sources(arrays: Iterable[NDArray[np.generic]]) -> list[Source]:
    return [
        Source(token_ids=tuple(_ids(array)))
        if array.ndim == 1
        else Source(pixels=np.asarray(array, np.float32).tobytes())
        for array in arrays
    ]


def _begin(graph: HostGraph, slot: int, source: Source | None) -> None:
    graph.begin(slot, graph.sources.run([source])[0] if graph.sources and source else None)


def _one_pass(graph: HostGraph, prompt: Sequence[int], arrays: _Arrays) -> NDArray[np.float32]:
    _begin(graph, 0, _source(arrays))
    logits: NDArray[np.float32] = feed(graph, 0, prompt)[0]
    return logits


def _ragged(graph: HostGraph, arrays: _Arrays) -> NDArray[np.float32] | None:
    """Decode the golden rows together; None if there are fewer slots than rows."""
    lengths = _ids(arrays["ragged_lengths"])
    if len(lengths) > graph.num_slots:
        return None
    sources = _ragged_sources(arrays)
    for slot, (prompt, length) in enumerate(zip(arrays["ragged_prompts"], lengths, strict=True)):
        _begin(graph, slot, sources[slot] if sources else None)
        feed(graph, slot, _ids(prompt[:length]))
    steps = np.asarray(arrays["ragged_steps"]).T
    logits: NDArray[np.float32] = np.empty((len(steps), len(lengths), graph.vocab_size), np.float32)
    for step, tokens in enumerate(steps):
        logits[step] = graph.decode(_ids(tokens), [length + step + 1 for length in lengths])
    return logits


def _invariance(agreement: Agreement, arrays: _Arrays, graph: HostGraph) -> Iterator[Check]:
    if graph.prefill_chunk is None:
        yield _chunks_check(agreement, arrays, graph)
    if graph.joins_prompts and graph.num_slots > 1:
        yield _together_check(agreement, arrays, graph)
    if graph.rewinds and graph.num_slots > 1:
        yield _copy_check(agreement, arrays, graph)
    if graph.sources is not None and (sources := _ragged_sources(arrays)):
        yield _sources_check(agreement, graph.sources, sources)
    for num_rows in sorted({min(size, graph.num_slots) for size in (2, 5, graph.num_slots)} - {1}):
        yield _rows_check(agreement, arrays, graph, num_rows)


def _chunks_check(agreement: Agreement, arrays: _Arrays, graph: HostGraph) -> Check:
    prompt = _ids(arrays["prompt"])[: graph.capacity - 1]
    whole = _one_pass(graph, prompt, arrays)
    _begin(graph, graph.num_slots - 1, _source(arrays))
    position = 0
    for size in arrays["chunks"]:
        chunked = graph.chunk(graph.num_slots - 1, prompt[position : position + int(size)], position)[0]
        position += int(size)
    grid = f"{len(prompt)} tokens in chunks of {_ids(arrays['chunks'])}"
    return agreement.check("one pass and chunks", [(chunked, whole)], grid)


def _together_check(agreement: Agreement, arrays: _Arrays, graph: HostGraph) -> Check:
    """Read prompts of several lengths in one run, padded, and each alone."""
    prompt = _ids(arrays["prompt"])[: graph.capacity // 16 * 16]
    num_rows = min(4, graph.num_slots)
    prompts = [prompt[: max(2, len(prompt) * (row + 1) // num_rows // 16 * 16)] for row in range(num_rows)]
    for slot in range(num_rows):
        _begin(graph, slot, None)
    together = graph.prompts(0, prompts)

    def alone(each: Sequence[int]) -> NDArray[np.float32]:
        _begin(graph, graph.num_slots - 1, None)
        logits: NDArray[np.float32] = graph.chunk(graph.num_slots - 1, each, 0)[0]
        return logits

    pairs = ((together[row], alone(each)) for row, each in enumerate(prompts))
    grid = f"prompts of {[len(each) for each in prompts]} tokens"
    return agreement.check("a prompt alone and among others", pairs, grid)


def _copy_check(agreement: Agreement, arrays: _Arrays, graph: HostGraph) -> Check:
    """Go on from a prompt that was computed in a slot, and from a copy of it in another."""
    prompt = _ids(arrays["prompt"])[: graph.capacity - 1]
    _one_pass(graph, prompt, arrays)
    graph.copy(0, graph.num_slots - 1, len(prompt))
    original, copied = (graph.chunk(slot, prompt[:1], len(prompt))[0] for slot in (0, graph.num_slots - 1))
    return agreement.check("a prompt and its copy", [(copied, original)], f"{len(prompt)} tokens")


def _sources_check(agreement: Agreement, graph: SourceGraph, sources: Sequence[Source]) -> Check:
    """Compare what is made of sources together, padded, with what is made of each alone."""
    pairs = []
    for source, together in zip(sources, graph.run(sources), strict=True):
        for name, alone in graph.run([source])[0].states.items():
            common = tuple(slice(size) for size in alone.shape)
            pairs.append((together.states[name][common], alone))
    grid = f"{len(sources)} sources of {[len(source.token_ids) for source in sources]} tokens"
    return agreement.check("a source alone and among others", pairs, grid)


def _rows_check(agreement: Agreement, arrays: _Arrays, graph: HostGraph, num_rows: int) -> Check:
    """Compare rows of a ragged decode step with the same rows alone, each about a source of its own if there are any.

    Every slot holds the whole prompt where a row can be taken back to any of its positions.
    """
    prompt = _ids(arrays["prompt"])[: graph.capacity - 1]
    lengths = [max(1, (len(prompt) * (row + 1)) // num_rows) for row in range(num_rows)]
    sources = _ragged_sources(arrays)
    tokens = [prompt[(7 * row) % len(prompt)] for row in range(num_rows)]
    if graph.rewinds:
        _one_pass(graph, prompt, arrays)

    def prepare(slot: int) -> None:
        if graph.rewinds:
            graph.copy(0, slot, len(prompt))
            return
        _begin(graph, slot, sources[slot % len(sources)] if sources else None)
        feed(graph, slot, prompt[: lengths[slot]])

    for slot in range(num_rows):
        prepare(slot)
    together = graph.decode(tokens, [length + 1 for length in lengths]).copy()

    def alone(slot: int) -> NDArray[np.float32]:
        if not graph.rewinds:
            prepare(slot)
        logits: NDArray[np.float32] = graph.chunk(slot, [tokens[slot]], lengths[slot])[0]
        return logits

    pairs = ((together[slot], alone(slot)) for slot in sorted({0, num_rows // 2, num_rows - 1}))
    grid = f"{num_rows} rows of {lengths[0]} to {lengths[-1]} tokens"
    return agreement.check("a row alone and among others", pairs, grid)
