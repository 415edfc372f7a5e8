"""A trained model becomes a bundle: weights, graph, certificate, golden run, manifest, and only then a directory.

Everything is written to a hidden directory beside the target; the manifest comes last, then one rename. Whatever fails
before leaves nothing behind.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from attendant.bundle import MANIFEST_NAME, Limits, Manifest, ModelName, SamplingDefaults
from export import manifest as describe
from export.calibration import measure_sizes
from export.certificate import NUM_ROWS, certify
from export.errors import ExportRefused
from export.golden import record_golden
from export.graph import StepGraph
from export.linear import FLOAT_KERNELS, INTEGER_KERNELS
from export.onnx_export import write_onnx
from export.rewrite import prepare_for_rounding
from export.runner import Runner
from export.text import CALIBRATION, QUALITY, tokens_of
from export.weights import decoder_weights
from models.checkpoint import TrainedModel
from models.decoder import Decoder
from models.decoder_config import DecoderConfig

__all__ = ["PRECISIONS", "ExportRefused", "Target", "export_bundle"]

PRECISIONS = ("fp32", "int8")
_MIN_MODEL_LEN = 16  # what the golden run and the checks need
_CACHE_TOKENS = 576  # of a row while checking: a window of the quality text fits

Report = Callable[[str], None]


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
    force: bool = False,
    report: Report = print,
) -> Manifest:
    """Write a certified bundle.

    Args:
        model: what to export.
        target: where to; an existing bundle is replaced with `force` only.
        precision: one of `PRECISIONS`.
        max_model_len: longest sequence to serve; the decoder's own limit by default.
        sampling_defaults: what to advise where a request is silent.
        force: replace a bundle of the same name and version.
        report: takes one line for every stage and check.

    Raises:
        ExportRefused: the model cannot be exported, the target exists, or a check failed.
    """
    if not isinstance(model.module, Decoder):
        raise ExportRefused(f"the checkpoint holds a {type(model.module).__name__}: export knows decoders only")
    config = model.module.config
    length = config.max_model_len if max_model_len is None else max_model_len
    _refuse_unfit(config, precision, length)
    if target.directory.exists() and not force:
        raise ExportRefused(f"{target.directory} exists; choose another version, or --force to replace it")
    target.directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.version}-", dir=target.directory.parent))
    try:
        text = tokens_of(QUALITY, model.tokenizer.json)
        _write_graph(scratch, model, precision, length, report)
        runner = Runner(scratch / describe.GRAPH_FILE, num_rows=NUM_ROWS, capacity=min(length, _CACHE_TOKENS))
        report("checking the graph against the decoder")
        certificate = certify(precision, scratch / describe.GRAPH_FILE, runner, model.module, text, report)
        golden = record_golden(runner, text, precision, scratch)
        manifest = Manifest(
            name=target.name,
            version=target.version,
            family="decoder",
            tasks=("generate",),
            precision=precision,
            target="cpu",
            limits=Limits(max_model_len=length),
            vocabulary=describe.vocabulary(model),
            sampling_defaults=sampling_defaults or SamplingDefaults(),
            graphs=(describe.step_graph(config),),
            states=describe.states(config),
            files=tuple(describe.files(scratch)),
            golden=golden,
            certificate=certificate,
            provenance=describe.provenance(model),
            producer=describe.producer(),
        )
        (scratch / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
        _move_into_place(scratch, target.directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report(f"wrote {target.directory}")
    return manifest


def _refuse_unfit(config: DecoderConfig, precision: str, max_model_len: int) -> None:
    if precision not in PRECISIONS:
        raise ExportRefused(f"precision is {precision!r}: export knows {' and '.join(PRECISIONS)}")
    known = {"attention": "softmax", "window": None, "qk_norm": False, "softcap": None, "norm_first": True}
    for field, value in (known | {"scale_embeddings": False}).items():
        if getattr(config, field) != value:
            raise ExportRefused(f"{field} is {getattr(config, field)!r}: export knows decoders with {value!r} only")
    if config.positions in ("alibi", "none"):
        raise ExportRefused(f"positions is {config.positions!r}: export knows rotary, learned and sinusoidal")
    multiple = 16 if config.positions == "rotary" else 8
    if config.head_dim % multiple:
        raise ExportRefused(
            f"head_dim is {config.head_dim}: with {config.positions} positions it must be a multiple of {multiple}"
        )
    if not _MIN_MODEL_LEN <= max_model_len <= config.max_model_len:
        raise ExportRefused(
            f"max_model_len is {max_model_len}: it must lie in {_MIN_MODEL_LEN} to {config.max_model_len} tokens"
        )


def _write_graph(directory: Path, model: TrainedModel, precision: str, max_model_len: int, report: Report) -> None:
    """Write the graph and the tokenizer."""
    weights, kernels = decoder_weights(model.module), FLOAT_KERNELS
    if precision == "int8":
        report("measuring activations and rotating weights")
        sizes = measure_sizes(model.module, tokens_of(CALIBRATION, model.tokenizer.json))
        weights, kernels = prepare_for_rounding(weights, sizes), INTEGER_KERNELS
    report(f"tracing and writing the {precision} graph")
    write_onnx(StepGraph(weights, kernels, max_model_len), directory / describe.GRAPH_FILE)
    (directory / describe.TOKENIZER_FILE).write_text(model.tokenizer.json, "utf-8")


def _move_into_place(scratch: Path, directory: Path) -> None:
    """Rename `scratch` to `directory`; what stood there is moved aside first, and deleted last."""
    scratch.chmod(0o755)  # mkdtemp makes it private
    retired = scratch.with_name(f"{scratch.name}-old")
    if directory.exists():
        directory.rename(retired)
    scratch.rename(directory)
    shutil.rmtree(retired, ignore_errors=True)
