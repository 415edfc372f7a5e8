"""A trained model becomes a bundle: weights, graph, certificate, golden run, manifest, and only then a directory.

Everything is written to a hidden directory beside the target; the manifest comes last, then one rename. Whatever fails
before leaves nothing behind.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from attendant.bundle import MANIFEST_NAME, Manifest, ModelName, SamplingDefaults, Vocabulary
from export import manifest as describe
from export.encoder import export_encoder
from export.errors import ExportRefused
from export.explain_graph import add_explain_graph
from export.generating import export_generating
from export.half import HALF_TYPES
from export.parts import Parts, Report
from export.source import TextSource, source_of, target_config
from export.text import QUALITY, tokens_of
from export.vision import export_vision, num_places
from models.checkpoint import TrainedModel
from models.classifier import Classifier, Tagger
from models.encoder import Encoder
from models.hard_vision import HardVision
from models.masked_lm import MaskedLanguageModel
from models.model import Model
from models.vision import VisionTransformer

__all__ = ["CPU_PRECISIONS", "CUDA_PRECISIONS", "ExportRefused", "Target", "export_bundle"]

CPU_PRECISIONS = ("fp32", "int8")
CUDA_PRECISIONS = tuple(HALF_TYPES)
_PRECISIONS = (*CPU_PRECISIONS, *CUDA_PRECISIONS)
_MIN_MODEL_LEN = 16  # what the golden run and the checks need

Export = Callable[[Path, TrainedModel, str, int, NDArray[np.int64], Report], Parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a bundle goes: `<repository>/<name>/<version>/`.

    Raises:
        ExportRefused: name or version cannot be those of a bundle.
    """

    repository: Path
    name: str
    version: int

    def __post_init__(self) -> None:
        try:
            TypeAdapter(ModelName).validate_python(self.name)
        except ValidationError:
            raise ExportRefused(
                f"name is {self.name!r}: it must be at most 63 of a-z, 0-9, '.', '_' and '-', and begin with a letter"
                " or digit"
            ) from None
        if self.version < 1:
            raise ExportRefused(f"version is {self.version}: it must be at least 1")

    @property
    def directory(self) -> Path:
        """The bundle's directory."""
        return self.repository / self.name / str(self.version)


def export_bundle(
    model: TrainedModel,
    target: Target,
    *,
    precision: str,
    max_model_len: int | None = None,
    sampling_defaults: SamplingDefaults | None = None,
    explain: bool | None = False,
    force: bool = False,
    report: Report = print,
) -> Manifest:
    """Write a certified bundle.

    Args:
        model: what to export.
        target: where to; an existing bundle is replaced with `force` only.
        precision: one of `CPU_PRECISIONS` or, of decoders that continue texts, of `CUDA_PRECISIONS`; it says which
            processor the bundle is for.
        max_model_len: longest sequence to serve; the decoder's own limit by default.
        sampling_defaults: what to advise where a request is silent.
        explain: add a graph that shows attention weights; where None, unless it would make the bundle much larger or
            the bundle is for CUDA.
        force: replace a bundle of the same name and version.
        report: takes one line for every stage and check.

    Raises:
        ExportRefused: the model cannot be exported, the target exists, or a check failed.
    """
    limit, export = _architecture(model.module)
    _require_finite(model.module)
    length = limit if max_model_len is None else max_model_len
    if precision not in _PRECISIONS:
        raise ExportRefused(f"precision is {precision!r}: export knows {', '.join(_PRECISIONS)}")
    if precision in CUDA_PRECISIONS and export is not export_generating:
        raise ExportRefused(f"precision is {precision!r}: only decoders that continue texts are exported for CUDA")
    if precision in CUDA_PRECISIONS and explain:
        raise ExportRefused(f"precision is {precision!r}: explain graphs are of bundles for the CPU, in fp32 or int8")
    if model.tokenizer is not None and not _MIN_MODEL_LEN <= length <= limit:
        raise ExportRefused(f"max_model_len is {length}: it must lie in {_MIN_MODEL_LEN} to {limit} tokens")
    if target.directory.exists() and not force:
        raise ExportRefused(f"{target.directory} exists; choose another version, or --force to replace it")
    target.directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.version}-", dir=target.directory.parent))
    try:
        text = np.zeros(0, np.int64) if model.tokenizer is None else tokens_of(QUALITY, model.tokenizer.json)
        parts = export(scratch, model, precision, length, text, report)
        if explain is not False and parts.target == "cpu":
            parts = add_explain_graph(scratch, model.module, parts, explain, report)
        vocabulary, source_vocabulary = _write_tokenizers(model, scratch)
        manifest = Manifest(
            name=target.name,
            version=target.version,
            family=parts.family,
            tasks=parts.tasks,
            precision=precision,
            target=parts.target,
            limits=parts.limits,
            vocabulary=vocabulary,
            source_vocabulary=source_vocabulary,
            image=parts.image,
            classes=parts.classes,
            sampling_defaults=sampling_defaults or SamplingDefaults(),
            embedding=parts.embedding,
            explain=parts.explain,
            graphs=parts.graphs,
            states=parts.states,
            files=tuple(describe.files(scratch)),
            golden=parts.golden,
            certificate=parts.certificate,
            provenance=describe.provenance(model),
            producer=describe.producer(),
        )
        (scratch / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
        _move_into_place(scratch, target.directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report(f"wrote {target.directory}")
    return manifest


def _require_finite(module: Model) -> None:
    for name, tensor in module.named_parameters():
        num_broken = tensor.numel() - int(tensor.isfinite().sum())
        if num_broken:
            raise ExportRefused(f"{name}: {num_broken} of {tensor.numel()} numbers of the checkpoint are not finite")


def _architecture(module: Model) -> tuple[int, Export]:
    """Return the longest sequence of a model, in tokens, and what exports it."""
    if isinstance(module, Encoder | MaskedLanguageModel):
        return module.config.max_source_len, export_encoder
    if isinstance(module, Classifier | Tagger):
        return module.config.encoder.max_source_len, export_encoder
    if isinstance(module, VisionTransformer | HardVision):
        return num_places(module), export_vision
    if module.state_specs():
        return target_config(module).max_model_len, export_generating
    raise ExportRefused(f"the checkpoint holds a {type(module).__name__}: export does not know what it does")


def _write_tokenizers(model: TrainedModel, directory: Path) -> tuple[Vocabulary | None, Vocabulary | None]:
    """Write the tokenizers of a model into `directory` and describe that of its tokens and that of its source."""
    vocabulary = source_vocabulary = None
    source = source_of(model.module)
    if model.tokenizer is not None:
        (directory / describe.TOKENIZER_FILE).write_text(model.tokenizer.json, "utf-8")
        size = target_config(model.module).vocab_size
        vocabulary = describe.vocabulary(model.tokenizer, size, describe.TOKENIZER_FILE)
    if model.source_tokenizer is not None and isinstance(source, TextSource):
        (directory / describe.SOURCE_TOKENIZER_FILE).write_text(model.source_tokenizer.json, "utf-8")
        source_vocabulary = describe.vocabulary(
            model.source_tokenizer, source.vocab_size, describe.SOURCE_TOKENIZER_FILE
        )
    return vocabulary, source_vocabulary


def _move_into_place(scratch: Path, directory: Path) -> None:
    """Rename `scratch` to `directory`; what stood there is moved aside first, and deleted last."""
    scratch.chmod(0o755)  # mkdtemp makes it private
    retired = scratch.with_name(f"{scratch.name}-old")
    if directory.exists():
        directory.rename(retired)
    scratch.rename(directory)
    shutil.rmtree(retired, ignore_errors=True)
