"""Models from files of their users: what is exported of them, and what is said of mistakes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attendant.bundle import read_manifest
from export import own_model
from export.__main__ import main

EXAMPLE = Path(__file__).parents[1] / "examples" / "nearest.py"
SPEC = f"{EXAMPLE}:build"


@pytest.fixture
def weights(tmp_path):
    """The example's weights, other than those it is built with."""
    tensors = own_model.read(SPEC, None).module.weights()
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, path)
    return path


def test_a_mechanism_of_ones_own_becomes_a_bundle(tmp_path, weights, capsys):
    arguments = ["--module", SPEC, "--checkpoint", str(weights), str(tmp_path / "bundles"), "--name", "nearest"]
    assert main([*arguments, "--no-explain"]) == 0
    assert "a layer has attention of its own" in capsys.readouterr().out
    manifest, _ = read_manifest(tmp_path / "bundles" / "nearest" / "1")
    assert manifest.limits.prefill_chunk == 64
    assert {state.rule.value for state in manifest.states} == {"append"}


def test_weights_are_those_of_the_checkpoint_file_or_directory(tmp_path, weights):
    weights.rename(tmp_path / "model.safetensors")
    model = own_model.read(SPEC, tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.module.weights().items())
    assert model.module.lm_head.weight is model.module.token_embedding.weight
    assert not model.module.training


def test_code_that_looks_at_values_is_refused_with_its_line(tmp_path, capsys):
    (tmp_path / "looking.py").write_text(f"""
import sys
sys.path.insert(0, {str(EXAMPLE.parent)!r})
from nearest import NearestAttention, build as build_nearest

class Looking(NearestAttention):
    def forward(self, x, chunk, past=None, *, need_weights=False):
        return super().forward(-x if x.sum() > 0 else x, chunk, past, need_weights=need_weights)

def build():
    model = build_nearest()
    model.module.layers[1].attention = Looking(64, 4)
    return model
""")
    assert main(["--module", f"{tmp_path / 'looking.py'}:build", str(tmp_path / "bundles"), "--name", "x"]) == 1
    error = capsys.readouterr().err
    assert "the step graph cannot be traced: Could not guard on data-dependent expression" in error
    assert "looking.py, line 8: return super().forward(-x if x.sum() > 0 else x" in error


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.py:build", "there is no file 'nowhere.py'; give FILE.py:FUNCTION"),
        (str(EXAMPLE), "there is no file ''"),
        (f"{EXAMPLE}:missing", "has no function 'missing'"),
        (f"{EXAMPLE}:_bytes", "returned a TokenizerInfo; it must be a models.checkpoint.TrainedModel"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(tmp_path, spec, message, capsys):
    assert main(["--module", spec, str(tmp_path), "--name", "x"]) == 1
    assert message in capsys.readouterr().err


def test_weights_that_do_not_fit_are_named(tmp_path, weights, capsys):
    tensors = load_file(weights)
    del tensors["final_norm.weight"]
    save_file(tensors, weights)
    assert main(["--module", SPEC, "--checkpoint", str(weights), str(tmp_path), "--name", "x"]) == 1
    assert "missing tensors: final_norm.weight" in capsys.readouterr().err


def test_one_source_of_a_model_is_named(tmp_path, capsys):
    assert main(["--module", SPEC, "--pretrained", "smollm2-135m", str(tmp_path), "--name", "x"]) == 1
    assert "name one of SOURCE, --pretrained, --synthetic and --module" in capsys.readouterr().err
    assert main(["--pretrained", "smollm2-135m", "--checkpoint", "x", str(tmp_path), "--name", "x"]) == 1
    assert "--checkpoint holds the weights of a --module" in capsys.readouterr().err
