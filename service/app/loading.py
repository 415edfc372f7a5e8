"""Which bundles to load, and loading one."""

import time
from collections.abc import Sequence
from typing import get_args

from service.app.start_error import StartError
from service.bundle import BundleRefused, FoundBundle, RefusedBundle
from service.encode_loop import EncodeLoop, EncodeOptions
from service.engine.explain_graph import ExplainGraph
from service.engine_loop import EngineLoop, EngineOptions
from service.metrics import ServerMetrics, Task
from service.rpc.catalog import Entry, ServedModel, State
from service.text import TextCodec


def choose(found: Sequence[FoundBundle | RefusedBundle], wanted: Sequence[str]) -> list[FoundBundle | RefusedBundle]:
    """Return the bundles that were asked for: all, or by "name" (the newest version) or "name/version".

    Raises:
        StartError: there is no such bundle.
    """
    by_key = {"/".join(map(str, _name_and_version(bundle))): bundle for bundle in found}
    newest = {_name_and_version(bundle)[0]: bundle for bundle in found}  # `found` rises by version
    if not wanted:
        return list(found)
    unknown = [model for model in wanted if model not in by_key and model not in newest]
    if unknown:
        raise StartError(f"--models: no bundle {', '.join(unknown)}; known: {', '.join(by_key) or 'none'}")
    chosen = [by_key.get(model) or newest[model] for model in wanted]
    return list({_name_and_version(bundle): bundle for bundle in chosen}.values())


def entry_of(
    bundle: FoundBundle | RefusedBundle,
    state: State,
    reason: str = "",
    *,
    served: ServedModel | None = None,
    retry_after_seconds: float | None = None,
) -> Entry:
    """Return what the catalog says of a bundle."""
    name, version = _name_and_version(bundle)
    found = bundle if isinstance(bundle, FoundBundle) else None
    return Entry(
        name=name,
        version=version,
        state=state,
        reason=reason,
        retry_after_seconds=retry_after_seconds,
        found=found,
        served=served,
    )


def load(
    bundle: FoundBundle,
    provider: str,
    options: EngineOptions,
    encode_options: EncodeOptions,
    metrics: ServerMetrics,
) -> ServedModel:
    """Verify and load one bundle; blocks for seconds.

    Raises:
        BundleRefused, BundleError: it is not fit to be served here.
        ValueError: the KV memory is too small for it.
    """
    started = time.perf_counter()
    manifest = bundle.manifest
    if manifest.target != provider:
        raise BundleRefused(f"it was made for {manifest.target}, this server runs on {provider}")
    task = _served_task(bundle)
    longest = manifest.limits.max_model_len + (manifest.limits.max_source_len or 0)
    model_metrics = metrics.model(manifest.key, longest, task)
    loop: EngineLoop | EncodeLoop
    if task == "generate":
        loop = EngineLoop.load(bundle, options, model_metrics)
    else:
        loop = EncodeLoop.load(bundle, encode_options, model_metrics)
    text = None if manifest.vocabulary is None else TextCodec(bundle.directory, manifest.vocabulary)
    source_text = None
    if manifest.source == "text" and (vocabulary := manifest.source_vocabulary or manifest.vocabulary) is not None:
        source_text = TextCodec(bundle.directory, vocabulary)
    return ServedModel(
        found=bundle,
        loop=loop,
        text=text,
        source_text=source_text,
        explain_graph=None if manifest.explain is None else ExplainGraph(bundle),
        metrics=model_metrics,
        load_seconds=time.perf_counter() - started,
    )


def _served_task(bundle: FoundBundle) -> Task:
    """Return what a bundle is served for: its first task that this build knows."""
    served: tuple[Task, ...] = get_args(Task)
    tasks = bundle.manifest.tasks
    for task in served:
        if task in tasks:
            return task
    raise BundleRefused(f"its tasks are {', '.join(tasks) or 'none'}: this build serves {', '.join(served)}")


def _name_and_version(bundle: FoundBundle | RefusedBundle) -> tuple[str, int]:
    if isinstance(bundle, RefusedBundle):
        return bundle.name, bundle.version
    return bundle.manifest.name, bundle.manifest.version
