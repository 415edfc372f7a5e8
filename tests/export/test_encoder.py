"""Encoders as bundles: what is written, what is refused, and that damage to a graph is found."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attendant.bundle import GraphKind, read_manifest
from export import encoder
from export.bundle import ExportRefused, Target, export_bundle
from export.encode_runner import EncodeRunner, Row
from export.encoder_task import task_of
from models.encoder import Encoder, EncoderConfig


@pytest.fixture(params=["fp32", "int8"])
def bundle(request, encoder_repository):
    return encoder_repository / f"encoder-{request.param}" / "1"


def rows_of(tiny_encoder, *lengths):
    generator = torch.Generator().manual_seed(0)
    size = tiny_encoder.module.config.vocab_size
    tokens = [torch.randint(size, (length,), generator=generator).numpy() for length in lengths]
    return [Row.of(each, is_pair=False) for each in tokens]


def test_the_manifest_says_how_to_embed(bundle, tiny_encoder):
    manifest, _ = read_manifest(bundle)
    assert (manifest.family, manifest.tasks) == ("encoder", ("embed",))
    assert (manifest.embedding.pooling, manifest.embedding.normalize, manifest.embedding.width) == ("mean", True, 48)
    assert manifest.limits.max_model_len == tiny_encoder.module.config.max_source_len
    assert manifest.graph(GraphKind.ENCODE) is not None
    assert manifest.states == ()


@pytest.mark.parametrize("lengths", [[1], [288], [7, 3, 50], [16, 17, 15, 1, 33]], ids=str)
def test_the_graph_computes_what_pytorch_does(encoder_repository, tiny_encoder, lengths):
    rows = rows_of(tiny_encoder, *lengths)
    graph = EncodeRunner(encoder_repository / "encoder-fp32" / "1" / encoder.GRAPH_FILE)
    for row, vectors in zip(rows, graph(rows), strict=True):
        assert encoder.relative_error(vectors, task_of(tiny_encoder).oracle(row)) < 1e-5


def test_bits_depend_neither_on_neighbours_nor_on_padding(bundle, tiny_encoder):
    rows = rows_of(tiny_encoder, 5, 16, 17, 40, 100, 255)
    graph = EncodeRunner(bundle / encoder.GRAPH_FILE)
    for row, vectors in zip(rows, graph(rows), strict=True):
        assert np.array_equal(vectors, graph([row])[0])


def test_a_graph_of_other_weights_is_refused(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "PARITY_BOUND", 1e-12)
    target = Target(repository=tmp_path, name="damaged", version=1)
    with pytest.raises(ExportRefused, match=r"certificate failed: hidden of one text: .*, allowed 1e-12"):
        export_bundle(tiny_encoder, target, precision="fp32", report=lambda line: None)
    assert list((tmp_path / "damaged").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "alibi"}, "positions is 'alibi'"),
        ({"attention": "elu"}, "attention is 'elu'"),
        ({"window": 4}, "window is 4"),
    ],
)
def test_what_export_does_not_know_is_refused_by_name(tiny_encoder, tmp_path, changes, message):
    config = tiny_encoder.module.config
    other = EncoderConfig(
        vocab_size=config.vocab_size,
        max_source_len=config.max_source_len,
        positions="learned",
        embedding_norm=True,
        stack=replace(config.stack, **changes),
    )
    model = replace(tiny_encoder, module=Encoder(other).eval())
    with pytest.raises(ExportRefused, match=message):
        export_bundle(model, Target(repository=tmp_path, name="x", version=1), precision="fp32", report=print)


def test_an_encoder_that_does_not_say_how_to_embed_is_refused(tiny_encoder, tmp_path):
    model = replace(tiny_encoder, embedding=None)
    with pytest.raises(ExportRefused, match="does not say how to embed"):
        export_bundle(model, Target(repository=tmp_path, name="x", version=1), precision="fp32", report=print)


def test_an_encoder_of_few_positions_can_be_exported(tiny_encoder, tmp_path):
    config = replace(tiny_encoder.module.config, max_source_len=20)
    model = replace(tiny_encoder, module=Encoder(config).eval())
    manifest = export_bundle(
        model, Target(repository=tmp_path, name="short", version=1), precision="fp32", report=lambda line: None
    )
    assert manifest.limits.max_model_len == 20
