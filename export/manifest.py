"""What the manifest says of a bundle: docs/bundle.md in the terms of the schema."""

from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from attendant.bundle import (
    LOGIT_ROWS,
    ROWS,
    SOURCE,
    Axis,
    DType,
    FileRef,
    GraphKind,
    GraphSpec,
    Producer,
    Provenance,
    Role,
    StateRule,
    StateSpec,
    TensorSpec,
    Vocabulary,
    file_sha256,
)
from export.source import Source
from models.checkpoint import TokenizerInfo, TrainedModel
from models.model import Model
from models.states import StateSpec as Declared

GRAPH_FILE, ENCODE_FILE = "step.onnx", "encode.onnx"
TOKENIZER_FILE, SOURCE_TOKENIZER_FILE = "tokenizer.json", "source_tokenizer.json"
_SOURCE_LENGTHS = TensorSpec(name="source_lengths", role=Role.SOURCE_LENGTHS, dtype=DType.INT32, axes=(ROWS,))
_TOTAL_LENGTH = TensorSpec(name="total_length", role=Role.TOTAL_LENGTH, dtype=DType.INT32, axes=())
_PACKAGES = ("attendant", "numpy", "onnx", "onnxruntime", "onnxscript", "torch")


def states(model: Model, source: Source | None) -> tuple[StateSpec, ...]:
    """Describe what a sequence remembers, as a model declares it."""
    return tuple(_state(spec, source) for spec in model.state_specs())


def _state(spec: Declared, source: Source | None) -> StateSpec:
    rule = StateRule(spec.rule)
    fixed = rule is StateRule.FIXED
    return StateSpec(
        name=spec.name,
        rule=rule,
        dtype=DType(str(spec.dtype).removeprefix("torch.")),
        axes=(ROWS, *(source.axis if size == SOURCE and source is not None else size for size in spec.shape)),
        input=f"fixed.{spec.name}" if fixed else f"past.{spec.name}",
        output=None if fixed else f"present.{spec.name}",
        made=f"made.{spec.name}" if spec.made or fixed else None,
        # A ring is as long as its window; only what is appended to has positions to release.
        window=spec.window if rule is StateRule.APPEND else None,
    )


def encode_graph(states: Sequence[StateSpec], source: Source) -> GraphSpec:
    """Describe the graph that makes states of a source."""
    outputs = (TensorSpec(name=s.made, role=Role.STATE, dtype=s.dtype, axes=s.axes) for s in states if s.made)
    return GraphSpec(
        kind=GraphKind.ENCODE,
        file=ENCODE_FILE,
        data=f"{ENCODE_FILE}.data",
        inputs=(source.tensor, *((_SOURCE_LENGTHS,) if source.axis == SOURCE else ())),
        outputs=tuple(outputs),
    )


def step_graph(states: Sequence[StateSpec], vocab_size: int, *, tokens: Axis, total_length: bool = False) -> GraphSpec:
    """Describe the step graph.

    Args:
        states: what a sequence remembers.
        vocab_size: of what is generated.
        tokens: the axis of new tokens, or 1 where a step takes one.
        total_length: whether the graph is told the capacity of its states.
    """
    return GraphSpec(
        kind=GraphKind.STEP,
        file=GRAPH_FILE,
        data=f"{GRAPH_FILE}.data",
        inputs=(
            TensorSpec(name="token_ids", role=Role.TOKEN_IDS, dtype=DType.INT64, axes=(ROWS, tokens)),
            TensorSpec(name="lengths", role=Role.LENGTHS, dtype=DType.INT32, axes=(ROWS,)),
            *((_TOTAL_LENGTH,) if total_length else ()),
            TensorSpec(name="logits_index", role=Role.LOGITS_INDEX, dtype=DType.INT64, axes=(LOGIT_ROWS,)),
            *((_SOURCE_LENGTHS,) if any(SOURCE in state.axes for state in states) else ()),
            *(TensorSpec(name=s.input, role=Role.STATE, dtype=s.dtype, axes=s.axes) for s in states),
        ),
        outputs=(
            TensorSpec(name="logits", role=Role.LOGITS, dtype=DType.FLOAT32, axes=(LOGIT_ROWS, vocab_size)),
            *(TensorSpec(name=s.output, role=Role.STATE, dtype=s.dtype, axes=s.axes) for s in states if s.output),
        ),
    )


def vocabulary(tokenizer: TokenizerInfo, size: int, file: str) -> Vocabulary:
    """Describe a tokenizer whose ids are below `size`."""
    return Vocabulary(
        file=file,
        size=size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=tokenizer.eos_token_ids,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
        add_bos=tokenizer.add_bos,
        chat_template=tokenizer.chat_template,
    )


def provenance(model: TrainedModel) -> Provenance:
    """Describe where the weights come from."""
    return Provenance(
        source=model.source, licence=model.licence, recipe=model.recipe, data=model.data, synthetic=model.synthetic
    )


def producer() -> Producer:
    """Describe what makes a bundle here and today."""
    return Producer(versions={name: _version(name) for name in _PACKAGES}, created=date.today().isoformat())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that nothing installed
        return "not installed"


def files(directory: Path) -> Iterator[FileRef]:
    """Describe every file of a directory."""
    for path in sorted(directory.iterdir()):
        yield FileRef(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path))
