"""Decoders of random weights: their sizes and texts, and a bundle of one too large for a twin of all its layers."""

import onnx_ir as ir
import pytest
import torch
from tokenizers import Tokenizer

from attendant.bundle import read_manifest
from export import cuda
from export.__main__ import main
from models import checkpoint, synthetic
from models.decoder import Decoder


def test_the_same_name_and_type_is_the_same_decoder():
    first, second = (synthetic.draw("llama-tiny", torch.bfloat16) for _ in range(2))
    weights = second.module.weights()
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.module.weights().items())
    assert float(first.module.layers[0].attention.query.weight.float().std()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(first.module.final_norm.weight.float(), torch.ones(256))


@pytest.mark.parametrize(("name", "billions"), [("llama-tiny", 0.0040), ("llama-1.3b", 1.24), ("llama-7b", 5.93)])
def test_a_shape_has_about_as_many_weights_as_its_name_says(name, billions):
    with torch.device("meta"):
        decoder = Decoder(synthetic.SHAPES[name])
    assert sum(tensor.numel() for tensor in decoder.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
    assert decoder.config.max_model_len > 8192 or name == "llama-tiny"


def test_every_text_is_bytes_and_every_token_is_a_text():
    tokenizer = Tokenizer.from_str(synthetic.draw("llama-tiny").tokenizer.json)
    text = "Zürich t300, 12 €\n"
    encoding = tokenizer.encode(text)
    assert len(encoding.ids) == len(text.encode())
    assert max(encoding.ids) < 256
    assert tokenizer.decode(encoding.ids) == text
    assert tokenizer.get_vocab_size() == 2048
    assert tokenizer.decode([300, 2047]) == " t300 t2047"


def test_a_checkpoint_remembers_that_its_weights_are_random(tmp_path):
    checkpoint.save(synthetic.draw("llama-tiny"), tmp_path / "tiny")
    assert checkpoint.load(tmp_path / "tiny").synthetic


def test_a_large_decoder_is_proved_on_a_twin_of_its_first_layers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cuda, "TWIN_BYTES", 0)
    arguments = ["--synthetic", "llama-tiny", "--precision", "bf16", "--max-model-len", "256"]
    assert main([*arguments, str(tmp_path), "--name", "tiny"]) == 0
    assert "with 3 of 4 layers" in capsys.readouterr().out
    manifest, _ = read_manifest(tmp_path / "tiny" / "1")
    assert manifest.provenance.synthetic
    assert manifest.precision == "bf16"
    assert manifest.certificate.quality is None
    checks = {check.name: check for check in manifest.certificate.checks}
    assert "3 of 4 layers" in checks["fp32 twin: one pass"].grid
    assert "the fp32 graph of all layers" in checks["nodes that differ from the fp32 twin"].grid
    graph = ir.load(tmp_path / "tiny" / "1" / "step.onnx").graph
    assert sum(node.op_type == "GroupQueryAttention" for node in graph) == 4
