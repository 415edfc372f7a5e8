"""Encoders of every build, with every head, as bundles: graphs compute what PyTorch does, alone and among others."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attendant.bundle import GraphKind, Role, read_manifest
from export import encoder
from export.bundle import ExportRefused, Target, export_bundle
from export.certificate import relative_error
from export.encode_runner import EncodeRunner
from export.encoder_task import task_of
from models import checkpoint
from models.classifier import Classifier, ClassifierConfig, Tagger
from models.encoder import EncoderConfig, StackConfig
from models.masked_lm import MaskedLanguageModel

LABELS = ("a", "b", "c")
SIZES = {"d_model": 48, "num_layers": 3, "num_heads": 3, "d_ff": 96}
BUILDS = {
    "pre-norm, rotary": {"positions": "none", "stack": StackConfig(**SIZES, positions="rotary")},
    "gated, RMS norm": {
        "positions": "sinusoidal",
        "stack": StackConfig(**SIZES, norm="rms", activation="swiglu", bias=False),
    },
    "one layer, narrow": {
        "positions": "learned",
        "num_segments": 2,
        "embedding_norm": True,
        "d_embedding": 16,
        "stack": StackConfig(**SIZES, norm_first=False, share_layers=True),
    },
}


def build(tiny_encoder, name, head):
    config = EncoderConfig(vocab_size=tiny_encoder.module.config.vocab_size, max_source_len=96, **BUILDS[name])
    torch.manual_seed(3)
    module = {
        "classify": lambda: Classifier(ClassifierConfig(encoder=config, num_classes=3)),
        "score": lambda: Classifier(ClassifierConfig(encoder=config, num_classes=1)),
        "tag": lambda: Tagger(ClassifierConfig(encoder=config, num_classes=3)),
        "fill_mask": lambda: MaskedLanguageModel(config),
    }[head]()
    with torch.no_grad():
        for parameter in module.eval().parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tokenizer = replace(tiny_encoder.tokenizer, mask_token_id=1)
    return replace(tiny_encoder, module=module, tokenizer=tokenizer, embedding=None, labels=LABELS)


@pytest.mark.parametrize(
    ("name", "head", "precision"),
    [
        ("pre-norm, rotary", "fill_mask", "fp32"),
        pytest.param("pre-norm, rotary", "classify", "int8", marks=pytest.mark.slow),
        ("gated, RMS norm", "tag", "fp32"),
        pytest.param("gated, RMS norm", "score", "fp32", marks=pytest.mark.slow),
        ("one layer, narrow", "classify", "fp32"),
        pytest.param("one layer, narrow", "fill_mask", "int8", marks=pytest.mark.slow),
    ],
)
def test_every_build_with_every_head_is_certified(tiny_encoder, tmp_path, name, head, precision):
    model = build(tiny_encoder, name, head)
    target = Target(repository=tmp_path, name="x", version=1)
    export_bundle(model, target, precision=precision, explain=False, report=lambda line: None)
    manifest, _ = read_manifest(target.directory)
    assert manifest.tasks == (head,)
    graph = manifest.graph(GraphKind.ENCODE)
    assert (graph.input(Role.SEGMENT_IDS) is not None) == (name == "one layer, narrow" and head == "classify")
    task, run = task_of(model), EncodeRunner(target.directory / encoder.GRAPH_FILE)
    generator = np.random.default_rng(0)
    rows = [task.row(generator.integers(0, 200, length)) for length in (3, 40, 17, 96)]
    for row, found in zip(rows, run(rows), strict=True):
        assert np.array_equal(found, run([row])[0])
        if precision == "fp32":
            assert relative_error(found, task.oracle(row)) < 1e-5


def test_what_serving_needs_is_asked_for(tiny_encoder, tmp_path):
    model = build(tiny_encoder, "pre-norm, rotary", "classify")
    with pytest.raises(ExportRefused, match="2 labels: the model tells 3 classes apart"):
        task_of(replace(model, labels=("a", "b")))
    model = build(tiny_encoder, "pre-norm, rotary", "fill_mask")
    with pytest.raises(ExportRefused, match="no mask_token_id"):
        task_of(replace(model, tokenizer=tiny_encoder.tokenizer))
    digits = checkpoint.load("models/checkpoints/digits")
    with pytest.raises(ExportRefused, match="models of images with 'fp32' only"):
        target = Target(repository=tmp_path, name="x", version=1)
        export_bundle(digits, target, precision="int8", report=lambda line: None)
