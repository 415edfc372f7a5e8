"""What the manifest says of a decoder's bundle: docs/bundle.md in the terms of the schema."""

from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

from attendant.bundle import (
    CAPACITY,
    LOGIT_ROWS,
    ROWS,
    TOKENS,
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
from export.onnx_export import state_names
from models.checkpoint import TokenizerInfo, TrainedModel
from models.decoder_config import DecoderConfig

GRAPH_FILE, TOKENIZER_FILE, SOURCE_TOKENIZER_FILE = "step.onnx", "tokenizer.json", "source_tokenizer.json"
_PACKAGES = ("attendant", "numpy", "onnx", "onnxruntime", "onnxscript", "torch")


def step_graph(config: DecoderConfig) -> GraphSpec:
    """Describe the step graph of a decoder."""
    past, present = _state_tensors("past", config), _state_tensors("present", config)
    logits = (LOGIT_ROWS, config.vocab_size)
    return GraphSpec(
        kind=GraphKind.STEP,
        file=GRAPH_FILE,
        data=f"{GRAPH_FILE}.data",
        inputs=(
            TensorSpec(name="token_ids", role=Role.TOKEN_IDS, dtype=DType.INT64, axes=(ROWS, TOKENS)),
            TensorSpec(name="lengths", role=Role.LENGTHS, dtype=DType.INT32, axes=(ROWS,)),
            TensorSpec(name="total_length", role=Role.TOTAL_LENGTH, dtype=DType.INT32, axes=()),
            TensorSpec(name="logits_index", role=Role.LOGITS_INDEX, dtype=DType.INT64, axes=(LOGIT_ROWS,)),
            *past,
        ),
        outputs=(TensorSpec(name="logits", role=Role.LOGITS, dtype=DType.FLOAT32, axes=logits), *present),
    )


def states(config: DecoderConfig) -> tuple[StateSpec, ...]:
    """Describe what a sequence remembers: every layer's keys and values."""
    past, present = _state_tensors("past", config), _state_tensors("present", config)
    return tuple(
        StateSpec(
            name=before.name.removeprefix("past."),
            rule=StateRule.APPEND,
            dtype=before.dtype,
            axes=before.axes,
            input=before.name,
            output=after.name,
        )
        for before, after in zip(past, present, strict=True)
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
    return Provenance(source=model.source, licence=model.licence, recipe=model.recipe, data=model.data)


def producer() -> Producer:
    """Describe what makes a bundle here and today."""
    return Producer(versions={name: version(name) for name in _PACKAGES}, created=date.today().isoformat())


def files(directory: Path) -> Iterator[FileRef]:
    """Describe every file of a directory."""
    for path in sorted(directory.iterdir()):
        yield FileRef(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path))


def _state_tensors(prefix: str, config: DecoderConfig) -> tuple[TensorSpec, ...]:
    axes = (ROWS, config.num_kv_heads, CAPACITY, config.head_dim)
    return tuple(
        TensorSpec(name=name, role=Role.STATE, dtype=DType.FLOAT32, axes=axes)
        for name in state_names(prefix, config.num_layers)
    )
