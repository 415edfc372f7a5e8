"""A trained model becomes a bundle: weights, graph, certificate, golden run, manifest, and only then a directory.

Everything is written to a hidden directory beside the target; the manifest comes last, then one rename. Whatever fails
before leaves nothing behind.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

from attendant.bundle import (
    CAPACITY,
    LOGIT_ROWS,
    MANIFEST_NAME,
    ROWS,
    TOKENS,
    Certificate,
    Check,
    DType,
    FileRef,
    GraphKind,
    GraphSpec,
    Limits,
    Manifest,
    Producer,
    Provenance,
    Quality,
    Role,
    SamplingDefaults,
    StateRule,
    StateSpec,
    TensorSpec,
    Vocabulary,
    file_sha256,
)
from export.calibration import measure_sizes
from export.certificate import NUM_ROWS, Oracle, invariance_checks, parity_checks
from export.golden import record_golden
from export.graph import StepGraph
from export.integers import exactness_check
from export.likelihood import compare_quality, text_log_likelihoods
from export.linear import FLOAT_KERNELS, INTEGER_KERNELS
from export.onnx_export import state_names, write_onnx
from export.rewrite import prepare_for_rounding
from export.runner import Runner
from export.text import CALIBRATION, QUALITY, tokens_of
from export.weights import decoder_weights
from models.checkpoint import TrainedModel
from models.decoder import DecoderConfig

GRAPH_FILE, TOKENIZER_FILE = "step.onnx", "tokenizer.json"
QUALITY_BOUND = 0.015
QUALITY_TOKENS, QUALITY_WINDOW = 16_384, 512
_CACHE_TOKENS = 576
_PACKAGES = ("attendant", "numpy", "onnx", "onnxruntime", "onnxscript", "torch")


class ExportRefused(Exception):
    """No bundle was written; the message says what is wrong and, for a check, by how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a bundle goes: `<repository>/<name>/<version>/`."""

    repository: Path
    name: str
    version: int

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
    report: Callable[[str], None] = print,
) -> Manifest:
    """Write a certified bundle.

    Args:
        model: what to export.
        target: where to; an existing bundle is replaced with `force` only.
        precision: "fp32" or "int8".
        max_model_len: longest sequence to serve; the decoder's own limit by default.
        sampling_defaults: what to advise where a request is silent.
        force: replace a bundle of the same name and version.
        report: takes one line for every stage and check.

    Raises:
        ExportRefused: the model cannot be exported, the target exists, or a check failed.
    """
    config = model.decoder.config
    length = config.max_model_len if max_model_len is None else max_model_len
    _refuse_unfit(config, length)
    if target.directory.exists() and not force:
        raise ExportRefused(f"{target.directory} exists; choose another version, or --force to replace it")
    target.directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.version}-", dir=target.directory.parent))
    try:
        manifest = _fill(scratch, model, target, precision, length, sampling_defaults, report)
        (scratch / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
        scratch.chmod(0o755)  # mkdtemp makes it private
        _move_into_place(scratch, target.directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report(f"wrote {target.directory}")
    return manifest


def _refuse_unfit(config: DecoderConfig, max_model_len: int) -> None:
    multiple = 16 if config.positions == "rotary" else 8
    if config.head_dim % multiple:
        raise ExportRefused(
            f"head_dim is {config.head_dim}: GroupQueryAttention with {config.positions} positions"
            f" needs a multiple of {multiple}"
        )
    if not 16 <= max_model_len <= config.max_model_len:
        raise ExportRefused(f"max_model_len is {max_model_len}: the decoder allows 16 to {config.max_model_len} tokens")


def _fill(
    directory: Path,
    model: TrainedModel,
    target: Target,
    precision: str,
    max_model_len: int,
    sampling_defaults: SamplingDefaults | None,
    report: Callable[[str], None],
) -> Manifest:
    """Write everything but the manifest, and return that."""
    config = model.decoder.config
    weights, kernels = decoder_weights(model.decoder), FLOAT_KERNELS
    if precision == "int8":
        report("measuring activations")
        sizes = measure_sizes(model.decoder, tokens_of(CALIBRATION, model.tokenizer.json))
        weights, kernels = prepare_for_rounding(weights, sizes), INTEGER_KERNELS
    report(f"{target.name}/{target.version} {precision}: tracing and writing the graph")
    write_onnx(StepGraph(weights, kernels, max_model_len), directory / GRAPH_FILE)
    (directory / TOKENIZER_FILE).write_text(model.tokenizer.json, "utf-8")
    runner = Runner(directory / GRAPH_FILE, num_rows=NUM_ROWS, capacity=min(max_model_len, _CACHE_TOKENS))
    oracle = Oracle(model.decoder)
    text = tokens_of(QUALITY, model.tokenizer.json)
    report("checking")
    if precision == "fp32":
        checks = [*parity_checks(runner, oracle, text), *invariance_checks(runner, text)]
        quality = None
    else:
        checks = [exactness_check(directory / GRAPH_FILE, text), *invariance_checks(runner, text)]
        quality = _quality(runner, oracle, text, report)
    certificate = _certify(checks, quality, report)
    golden = record_golden(runner, text, precision, directory)
    graph, states = _describe_graph(config)
    tokenizer = model.tokenizer
    return Manifest(
        name=target.name,
        version=target.version,
        family="decoder",
        tasks=("generate",),
        precision=precision,
        target="cpu",
        limits=Limits(max_model_len=max_model_len),
        vocabulary=Vocabulary(
            file=TOKENIZER_FILE,
            size=config.vocab_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_ids=tokenizer.eos_token_ids,
            pad_token_id=tokenizer.pad_token_id,
            add_bos=tokenizer.add_bos,
            chat_template=tokenizer.chat_template,
        ),
        sampling_defaults=sampling_defaults or SamplingDefaults(),
        graphs=(graph,),
        states=states,
        files=tuple(_file_refs(directory)),
        golden=golden,
        certificate=certificate,
        provenance=Provenance(source=model.source, licence=model.licence, recipe=model.recipe, data=model.data),
        producer=Producer(versions={name: version(name) for name in _PACKAGES}, created=date.today().isoformat()),
    )


def _quality(runner: Runner, oracle: Oracle, text: np.ndarray, report: Callable[[str], None]) -> Quality:
    report(f"measuring perplexity on {QUALITY_TOKENS} tokens")
    window = min(QUALITY_WINDOW, runner.capacity - 1)
    likelihoods = [
        text_log_likelihoods(logits_of, text, window=window, num_tokens=QUALITY_TOKENS)
        for logits_of in (oracle.logits, runner.all_logits)
    ]
    return compare_quality(*likelihoods, text=QUALITY.name, bound=QUALITY_BOUND)


def _certify(checks: list[Check], quality: Quality | None, report: Callable[[str], None]) -> Certificate:
    for check in checks:
        report(f"  {check.name}: {check.measured:.3g}, allowed {check.bound:g} ({check.grid})")
    if quality is not None:
        report(
            f"  perplexity {quality.perplexity:.3f}, fp32 {quality.reference_perplexity:.3f}:"
            f" {quality.relative_increase:+.2%} (standard error {quality.standard_error:.2%}),"
            f" allowed {quality.bound:+.2%}"
        )
    failed = [
        f"{check.name}: {check.measured:.3g}, allowed {check.bound:g} ({check.grid})"
        for check in checks
        if not check.passed
    ]
    if quality is not None and not quality.relative_increase <= quality.bound:
        failed.append(f"perplexity rose by {quality.relative_increase:.2%}, allowed {quality.bound:.2%}")
    if failed:
        raise ExportRefused("; ".join(failed))
    return Certificate(checks=tuple(checks), quality=quality)


def _describe_graph(config: DecoderConfig) -> tuple[GraphSpec, tuple[StateSpec, ...]]:
    """Return the step graph and its states as the manifest says them."""
    axes = (ROWS, config.num_kv_heads, CAPACITY, config.head_dim)
    past, present = (state_names(prefix, config.num_layers) for prefix in ("past", "present"))

    def state_tensors(names: Iterable[str]) -> list[TensorSpec]:
        return [TensorSpec(name=name, role=Role.STATE, dtype=DType.FLOAT32, axes=axes) for name in names]

    graph = GraphSpec(
        kind=GraphKind.STEP,
        file=GRAPH_FILE,
        data=f"{GRAPH_FILE}.data",
        inputs=(
            TensorSpec(name="token_ids", role=Role.TOKEN_IDS, dtype=DType.INT64, axes=(ROWS, TOKENS)),
            TensorSpec(name="lengths", role=Role.LENGTHS, dtype=DType.INT32, axes=(ROWS,)),
            TensorSpec(name="total_length", role=Role.TOTAL_LENGTH, dtype=DType.INT32, axes=()),
            TensorSpec(name="logits_index", role=Role.LOGITS_INDEX, dtype=DType.INT64, axes=(LOGIT_ROWS,)),
            *state_tensors(past),
        ),
        outputs=(
            TensorSpec(name="logits", role=Role.LOGITS, dtype=DType.FLOAT32, axes=(LOGIT_ROWS, config.vocab_size)),
            *state_tensors(present),
        ),
    )
    states = tuple(
        StateSpec(
            name=before.removeprefix("past."),
            rule=StateRule.APPEND,
            dtype=DType.FLOAT32,
            axes=axes,
            input=before,
            output=after,
        )
        for before, after in zip(past, present, strict=True)
    )
    return graph, states


def _file_refs(directory: Path) -> Iterable[FileRef]:
    for path in sorted(directory.iterdir()):
        yield FileRef(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path))


def _move_into_place(scratch: Path, directory: Path) -> None:
    """Rename `scratch` to `directory`; what stood there is moved aside first, and deleted last."""
    retired = scratch.with_name(f"{scratch.name}-old")
    if directory.exists():
        directory.rename(retired)
    scratch.rename(directory)
    shutil.rmtree(retired, ignore_errors=True)
