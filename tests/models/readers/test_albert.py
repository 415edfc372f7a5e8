"""A real ALBERT, the one that the package rxnmapper 0.4.3 brings (MIT), against transformers."""

import json
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AlbertConfig, AlbertForMaskedLM

from models.readers import huggingface

pytestmark = pytest.mark.slow

INSIDE = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"


@pytest.fixture(scope="module")
def weights():
    try:
        directory = Path(str(distribution("rxnmapper").locate_file(INSIDE)))
    except PackageNotFoundError:
        pytest.skip("pip install --no-deps rxnmapper==0.4.3 brings the weights")
    return directory, torch.load(directory / "pytorch_model.bin", map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def directory(weights, tmp_path_factory):
    """The same weights in today's formats."""
    source, tensors = weights
    directory = tmp_path_factory.mktemp("albert")
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    shutil.copy(source / "config.json", directory)
    vocabulary = {word: index for index, word in enumerate((source / "vocab.txt").read_text().splitlines())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"mask_token": "[MASK]"}))
    return directory


@torch.no_grad()
def test_it_fills_gaps_as_in_transformers(weights, directory):
    trained = huggingface.read(directory)
    reference = AlbertForMaskedLM(AlbertConfig.from_pretrained(directory)).eval()
    assert not reference.load_state_dict(weights[1], strict=False).missing_keys
    token_ids = torch.randint(20, 591, (3, 64), generator=torch.Generator().manual_seed(0))
    token_ids[:, 7] = trained.tokenizer.mask_token_id
    ours, theirs = trained.module(token_ids), reference(token_ids).logits
    assert (ours - theirs).abs().max() <= 1e-4
    assert (ours.softmax(-1) - theirs.softmax(-1)).abs().max() <= 1e-4
