"""Directories written by transformers with random weights, read by ours, must compute the same logits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from models import checkpoint
from models.generate import greedy
from models.readers import huggingface
from models.readers.errors import ReadError

VOCAB_SIZE = 300
LLAMA = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA),
    "llama tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama biases": LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    "llama head_dim": LlamaConfig(**LLAMA, head_dim=16),
    "llama theta": LlamaConfig(**LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "llama multi-query": LlamaConfig(**(LLAMA | {"num_key_value_heads": 1})),
    "mistral": MistralConfig(**LLAMA, sliding_window=None),
    "qwen2": Qwen2Config(**LLAMA),
    "gpt2": GPT2Config(**GPT2),
    "gpt2 untied": GPT2Config(**GPT2, tie_word_embeddings=False),
    "gpt2 erf": GPT2Config(**GPT2, activation_function="gelu", n_inner=100),
}


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # initial norms and biases are 1 and 0, which would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def write(tmp_path, byte_tokenizer_json):
    def write_model(model, *, adds_bos=False, chat_template=None, **options):
        model.save_pretrained(tmp_path, **options)
        tokenizer = Tokenizer.from_str(byte_tokenizer_json)
        if adds_bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
            )
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
        wrapped.chat_template = chat_template
        wrapped.save_pretrained(tmp_path)
        return tmp_path

    return write_model


def edit(path, **changes):
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name, write):
    reference = random_model(CONFIGS[name])
    model = huggingface.read(write(reference))
    token_ids = torch.randint(VOCAB_SIZE, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = reference(token_ids).logits, model.module(token_ids)
    assert (actual - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_tokens_equal_those_of_transformers(name, write):
    reference = random_model(CONFIGS[name])
    decoder = huggingface.read(write(reference)).module
    prompt = [5, 250, 17, 99]
    expected = reference.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :].tolist()
    assert greedy(decoder, prompt, 20) == expected
    stop = expected[7]
    assert greedy(decoder, prompt, 20, {stop}) == expected[: expected.index(stop) + 1]


def test_a_checkpoint_of_it_computes_the_same(write, tmp_path):
    model = huggingface.read(write(random_model(CONFIGS["llama tied"])))
    checkpoint.save(model, tmp_path / "ours")
    loaded = checkpoint.load(tmp_path / "ours")
    token_ids = torch.randint(VOCAB_SIZE, (2, 9))
    assert torch.equal(loaded.module(token_ids), model.module(token_ids))
    assert (loaded.tokenizer, loaded.source, loaded.licence) == (model.tokenizer, model.source, model.licence)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_tokenizer_gives_the_same_ids(adds_bos, write):
    directory = write(random_model(CONFIGS["llama"]), adds_bos=adds_bos, chat_template="{{ messages }}")
    tokenizer = huggingface.read(directory).tokenizer
    reference = PreTrainedTokenizerFast.from_pretrained(directory)
    assert tokenizer.add_bos is adds_bos
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.pad_token_id) == (0, (1,), None)
    assert tokenizer.chat_template == "{{ messages }}"
    for text in ("the cat sat", "naïve 日本語\n\n  1234", "</s> the"):
        assert Tokenizer.from_str(tokenizer.json).encode(text).ids == reference(text)["input_ids"]


def test_shards_are_read_as_one_model(write):
    reference = random_model(CONFIGS["llama"])
    directory = write(reference, max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    token_ids = torch.randint(VOCAB_SIZE, (1, 12))
    with torch.no_grad():
        assert (huggingface.read(directory).module(token_ids) - reference(token_ids).logits).abs().max() < 1e-4


def test_half_precision_weights_become_float32(write):
    model = huggingface.read(write(random_model(CONFIGS["gpt2"]).bfloat16()))
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}


def test_the_model_card_names_the_licence(write):
    directory = write(random_model(CONFIGS["gpt2"]))
    assert huggingface.read(directory).licence == "unknown"
    (directory / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\n")
    assert huggingface.read(directory).licence == "mit"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "mamba"}, "mamba.*known are llama"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.rope_type.*llama3"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias is True and mlp_bias False"),
        ("llama", {"num_key_value_heads": 4}, "num_heads is 6.*num_kv_heads, 4"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("mistral", {"sliding_window": 64}, "sliding_window is 64"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("gpt2", {"activation_function": "quick_gelu"}, "quick_gelu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, changes, message, write):
    directory = write(random_model(CONFIGS[name]))
    edit(directory / "config.json", **changes)
    with pytest.raises(ReadError, match=message):
        huggingface.read(directory)


def test_missing_surplus_and_misshapen_tensors_are_named(write):
    path = write(random_model(CONFIGS["llama"])) / "model.safetensors"
    tensors = load_file(path)
    removed = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path)
    with pytest.raises(ReadError, match=r"missing tensors: layers\.1\.feed_forward\.up\.weight$"):
        huggingface.read(path.parent)
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": removed, "model.extra.weight": removed.clone()}, path)
    with pytest.raises(ReadError, match=r"surplus tensors: model\.extra\.weight$"):
        huggingface.read(path.parent)
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": removed[1:].clone()}, path)
    with pytest.raises(ReadError, match=r"feed_forward\.up\.weight has shape \(79, 48\).*\(80, 48\)"):
        huggingface.read(path.parent)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_or_missing_file_is_named(name, write):
    path = write(random_model(CONFIGS["gpt2"])) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ReadError, match=f"{path.parent}"):
        huggingface.read(path.parent)
    path.unlink()
    with pytest.raises(ReadError, match=name):
        huggingface.read(path.parent)


def test_a_field_without_a_default_is_named(write):
    directory = write(random_model(CONFIGS["gpt2"]))
    document = json.loads((directory / "config.json").read_text())
    del document["n_embd"]
    (directory / "config.json").write_text(json.dumps(document))
    with pytest.raises(ReadError, match=r"config\.json lacks n_embd"):
        huggingface.read(directory)
