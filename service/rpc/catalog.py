"""Which bundles there are, which of them are served, and what a `model` on the wire means."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from attendant.bundle import Check
from service.bundle import FoundBundle
from service.encode_loop import EncodeLoop
from service.engine.device_identity import DeviceIdentity
from service.engine.explain_graph import ExplainGraph
from service.engine_loop import EngineLoop
from service.errors import InvalidField, ModelNotFound, ModelUnavailable, Unsupported
from service.metrics import ModelMetrics, Task
from service.text import TextCodec

_MAX_SHOWN = 8
_WORDS: dict[Task, str] = {
    "generate": "generate text",
    "embed": "embed texts",
    "classify": "classify",
    "tag": "tag tokens",
    "fill_mask": "fill masks",
    "score": "score texts",
}


class State(Enum):
    """Whether a bundle is served."""

    LOADING = "loading"
    READY = "ready"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCertificate:
    """What was measured when a bundle was first loaded on a device, and when that was."""

    device: DeviceIdentity
    certified_at: datetime
    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """All that answering for one bundle takes.

    `text` is None if it has no vocabulary, `source_text` if it does not write about texts, `explain_graph` if there is
    none, `certificate` if there is no directory to keep one in.
    """

    found: FoundBundle
    loop: EngineLoop | EncodeLoop
    text: TextCodec | None
    source_text: TextCodec | None = None
    explain_graph: ExplainGraph | None = None
    metrics: ModelMetrics
    load_seconds: float
    certificate: DeviceCertificate | None = None

    @property
    def key(self) -> str:
        """Its full name, "name/version"."""
        return self.found.manifest.key

    @property
    def codec(self) -> TextCodec:
        """What tokenises.

        Raises:
            Unsupported: the bundle takes no text.
        """
        if self.text is None:
            raise Unsupported(f"model {self.key} takes no text; its tasks: {self._tasks}")
        return self.text

    @property
    def source_codec(self) -> TextCodec:
        """What tokenises the texts that the bundle writes about.

        Raises:
            Unsupported: it does not write about texts.
        """
        if self.source_text is None:
            raise Unsupported(f"model {self.key} reads no source text; its tasks: {self._tasks}")
        return self.source_text

    @property
    def explainer(self) -> ExplainGraph:
        """What shows its attention.

        Raises:
            Unsupported: the bundle does not.
        """
        if self.explain_graph is None:
            raise Unsupported(
                f"model {self.key} has no explain graph; its tasks: {self._tasks}. A bundle exported with --explain has"
                " one, if the model computes attention weights"
            )
        return self.explain_graph

    @property
    def engine(self) -> EngineLoop:
        """What generates.

        Raises:
            Unsupported: the bundle does not.
        """
        if isinstance(self.loop, EngineLoop):
            return self.loop
        raise self._cannot("generate")

    def encoder(self, task: Task) -> EncodeLoop:
        """Return what does a task of encoders.

        Raises:
            Unsupported: the bundle does not.
        """
        if isinstance(self.loop, EncodeLoop) and task in self.found.manifest.tasks:
            return self.loop
        raise self._cannot(task)

    @property
    def _tasks(self) -> str:
        return ", ".join(self.found.manifest.tasks)

    def _cannot(self, task: Task) -> Unsupported:
        return Unsupported(f"model {self.key} does not {_WORDS[task]}; its tasks: {self._tasks}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One bundle of the repository; `found` is None if even its manifest is bad, `reason` says why it is not served.

    `retry_after_seconds` is a guess at when it will be, of one that is loaded again.
    """

    name: str
    version: int
    state: State
    reason: str = ""
    retry_after_seconds: float | None = None
    found: FoundBundle | None = None
    served: ServedModel | None = None

    @property
    def key(self) -> str:
        """Its full name, "name/version"."""
        return f"{self.name}/{self.version}"


class ModelCatalog:
    """The bundles by name and version; changed and read on the event loop only."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries = {entry.key: entry for entry in entries}

    def put(self, entry: Entry) -> None:
        """Add a bundle or replace what is known of it."""
        self._entries[entry.key] = entry

    @property
    def entries(self) -> list[Entry]:
        """All bundles, by name, then version."""
        return sorted(self._entries.values(), key=lambda entry: (entry.name, entry.version))

    @property
    def served(self) -> list[ServedModel]:
        """The bundles that are served."""
        return [entry.served for entry in self.entries if entry.served is not None]

    def find(self, model: str) -> Entry:
        """Return the bundle that "name/version" names, or the newest served (else the newest) of "name".

        Raises:
            InvalidField: no model is named.
            ModelNotFound: there is none of that name or version.
        """
        if not model:
            raise InvalidField("model", model, f"name a model: {self._shown()}")
        if (entry := self._entries.get(model)) is not None:
            return entry
        versions = [entry for entry in self.entries if entry.name == model]
        if not versions:
            shown = model if len(model) <= 80 else model[:77] + "..."
            raise ModelNotFound(f"there is no model {shown!r}; known: {self._shown()}", {"model": shown})
        return max(versions, key=lambda entry: (entry.served is not None, entry.version))

    def resolve(self, model: str) -> ServedModel:
        """Return the served bundle of this name, see `find`.

        Raises:
            ModelUnavailable: it is not served (yet).
        """
        entry = self.find(model)
        if entry.served is None:
            why = entry.reason or entry.state.value
            raise ModelUnavailable(
                f"model {entry.key} is not served: {why}",
                {"model": entry.key, "state": entry.state.value},
                entry.retry_after_seconds,
            )
        return entry.served

    def label(self, model: str) -> str | None:
        """Return the full name for a metric's label, or None if the repository has no such model."""
        try:
            return self.find(model).key
        except (InvalidField, ModelNotFound):
            return None

    def _shown(self) -> str:
        keys = [entry.key for entry in self.entries]
        more = f" and {len(keys) - _MAX_SHOWN} more" if len(keys) > _MAX_SHOWN else ""
        return (", ".join(keys[:_MAX_SHOWN]) or "none") + more
