"""GGUF files written by gguf's own writer, read by ours."""

import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, TokenType, dequantize, quantize
from tokenizers import Tokenizer

from models.decoder import Decoder, DecoderConfig
from models.readers import gguf
from models.readers.errors import ReadError

CONFIGS = {
    "llama": DecoderConfig(
        vocab_size=300,
        d_model=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        d_ff=96,
        max_model_len=128,
        positions="rotary",
        rope_theta=50000.0,
        rope_interleaved=True,
        norm="rms",
        norm_eps=2.0**-17,
        activation="swiglu",
        bias="none",
        tie_embeddings=True,
    ),
    "gpt2": DecoderConfig(
        vocab_size=300,
        d_model=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        d_ff=96,
        max_model_len=32,
        positions="learned",
        norm="layer",
        norm_eps=2.0**-17,
        activation="gelu_tanh",
        bias="all",
        tie_embeddings=False,
    ),
}
NAMES = {
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.up": "ffn_up",
    "feed_forward.gate": "ffn_gate",
    "feed_forward.down": "ffn_down",
    "token_embedding": "token_embd",
    "position_embedding": "position_embd",
    "final_norm": "output_norm",
    "lm_head": "output",
}


def random_decoder(architecture):
    torch.manual_seed(0)
    decoder = Decoder(CONFIGS[architecture]).eval()
    for parameter in decoder.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return decoder


def gguf_tensors(decoder):
    weights = {name: tensor.numpy() for name, tensor in decoder.state_dict().items()}
    if decoder.config.tie_embeddings:
        del weights["lm_head.weight"]
    tensors = {}
    for name, values in weights.items():
        module, kind = name.rsplit(".", 1)
        prefix = ""
        if module.startswith("layers."):
            _, index, module = module.split(".", 2)
            prefix = f"blk.{index}."
        tensors[f"{prefix}{NAMES[module]}.{kind}"] = values
    if decoder.config.positions == "learned":  # GPT-2 files hold query, key and value in one tensor
        for index in range(decoder.config.num_layers):
            for kind in ("weight", "bias"):
                parts = [tensors.pop(f"blk.{index}.attn_{part}.{kind}") for part in "qkv"]
                tensors[f"blk.{index}.attn_qkv.{kind}"] = np.concatenate(parts)
    return tensors


def metadata(writer, config):
    writer.add_context_length(config.max_model_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    if config.positions == "rotary":
        writer.add_head_count_kv(config.num_kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_rope_dimension_count(config.head_dim)
    else:
        writer.add_layer_norm_eps(config.norm_eps)


@pytest.fixture
def write(tmp_path, byte_tokenizer_json):
    def write_file(decoder, kind=Type.F32, *, architecture=None, pre="gpt-2", edit=None, edit_tensors=None):
        """Write a GGUF file; matrices are stored as `kind`. `edit` may add metadata, `edit_tensors` change tensors."""
        config = decoder.config
        architecture = architecture or ("llama" if config.positions == "rotary" else "gpt2")
        path = tmp_path / "model.gguf"
        writer = GGUFWriter(path, architecture)
        metadata(writer, config)
        tokenizer = json.loads(byte_tokenizer_json)["model"]
        tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
        tokens += [f"<unused{index}>" for index in range(config.vocab_size - len(tokens))]
        types = [TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(tokens) - 2)
        types[-1] = TokenType.USER_DEFINED
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_chat_template("{{ messages[0].content }}")
        writer.add_license("mit")
        if edit is not None:
            edit(writer)
        tensors = gguf_tensors(decoder)
        if edit_tensors is not None:
            edit_tensors(tensors)
        for name, values in tensors.items():
            if values.ndim == 2 and kind is not Type.F32:
                writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write_file


@pytest.mark.parametrize("architecture", CONFIGS)
def test_float32_files_give_back_configuration_and_logits(architecture, write):
    decoder = random_decoder(architecture)
    model = gguf.read(write(decoder))
    expected = CONFIGS[architecture]
    assert model.module.config == (
        expected if expected.positions == "rotary" else DecoderConfig(**fields(expected, rope_interleaved=False))
    )
    token_ids = torch.randint(300, (2, 20))
    assert torch.equal(model.module(token_ids), decoder(token_ids))
    assert (model.licence, model.source) == ("mit", "model (model.gguf)")


def fields(config, **changes):
    return {name: getattr(config, name) for name in config.__slots__} | changes


# The largest relative error that each type may make on its largest entry: half a step of its grid.
STEPS = {
    Type.F16: 2**-11,
    Type.BF16: 2**-8,
    Type.Q8_0: 1 / 127,
    Type.Q4_0: 1 / 7,
    Type.Q4_1: 2 / 15,
    Type.Q5_0: 1 / 15,
    Type.Q5_1: 2 / 31,
}


@pytest.mark.parametrize("kind", STEPS, ids=lambda kind: kind.name)
def test_quantised_matrices_come_back_within_a_step(kind, write):
    decoder = random_decoder("llama")
    read = gguf.read(write(decoder, kind)).module.state_dict()
    for name, original in decoder.state_dict().items():
        if original.dim() == 1:
            assert torch.equal(read[name], original), name
        else:
            blocks, others = original.reshape(-1, 32), read[name].reshape(-1, 32)
            step = STEPS[kind] * blocks.abs().amax(-1, keepdim=True)
            assert ((others - blocks).abs() <= step * 1.01).all(), name
            assert not torch.equal(others, blocks)


def test_blocks_decode_as_the_format_says():
    """One block of Q8_0, Q4_0 and Q4_1 by hand: a half-precision scale, then 32 values, low nibbles first."""
    generator = np.random.default_rng(0)
    scale, least = np.float16(0.375), np.float16(-1.25)
    nibbles = generator.integers(0, 256, 16, dtype=np.uint8)
    unpacked = np.concatenate([nibbles & 15, nibbles >> 4]).astype(np.float32)
    signed = generator.integers(-127, 128, 32, dtype=np.int8)
    blocks = {
        Type.Q8_0: (scale.tobytes() + signed.tobytes(), scale * signed.astype(np.float32)),
        Type.Q4_0: (scale.tobytes() + nibbles.tobytes(), scale * (unpacked - 8)),
        Type.Q4_1: (scale.tobytes() + least.tobytes() + nibbles.tobytes(), scale * unpacked + least),
    }
    for kind, (data, expected) in blocks.items():
        np.testing.assert_allclose(
            dequantize(np.frombuffer(data, np.uint8)[None], kind)[0], expected, rtol=1e-6, err_msg=kind.name
        )


def test_the_tokenizer_equals_the_one_the_file_was_made_from(write, byte_tokenizer_json):
    info = gguf.read(write(random_decoder("llama"))).tokenizer
    ours, original = Tokenizer.from_str(info.json), Tokenizer.from_str(byte_tokenizer_json)
    for text in ("the cat sat on 1999 mats", "naïve 日本語 \U0001f600\n\n\ttabs  ", "</s>the<s>"):
        assert ours.encode(text).ids == original.encode(text).ids
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    assert (info.bos_token_id, info.eos_token_ids, info.pad_token_id, info.add_bos) == (0, (1,), None, False)
    assert info.chat_template == "{{ messages[0].content }}"


def test_user_defined_tokens_match_whole_and_survive_decoding(write):
    model = gguf.read(write(random_decoder("llama")))
    tokenizer = Tokenizer.from_str(model.tokenizer.json)
    last = tokenizer.id_to_token(299)
    ids = tokenizer.encode(f"the {last}cat").ids
    assert 299 in ids
    assert tokenizer.decode(ids) == f"the {last}cat"


def test_the_smollm_pre_tokenizer_splits_digits_singly(write):
    def tokens(pre):
        tokenizer = Tokenizer.from_str(gguf.read(write(random_decoder("llama"), pre=pre)).tokenizer.json)
        return tokenizer.encode("1999").tokens

    assert len(tokens("gpt-2")) < 4
    assert tokens("smollm") == ["1", "9", "9", "9"]


def test_a_second_end_of_turn_token_also_ends_generation(write):
    model = gguf.read(write(random_decoder("llama"), edit=lambda writer: writer.add_eot_token_id(0)))
    assert model.tokenizer.eos_token_ids == (1, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'.*'llama' and 'gpt2'"),
        ({"pre": "tekken"}, r"tokenizer\.ggml\.pre is 'tekken'.*'gpt-2' and 'smollm'"),
        ({"edit": lambda w: w.add_expert_count(8)}, r"llama\.expert_count is 8"),
        ({"edit": lambda w: w.add_sliding_window(64)}, r"llama\.attention\.sliding_window is 64"),
        ({"edit": lambda w: w.add_string("llama.rope.scaling.type", "yarn")}, r"rope\.scaling\.type is 'yarn'"),
        ({"edit_tensors": lambda t: t.pop("blk.1.ffn_up.weight")}, r"missing tensors: layers\.1\.feed_forward\.up"),
        ({"edit_tensors": lambda t: t.pop("token_embd.weight")}, r"missing tensors: token_embedding\.weight"),
        (
            {"edit_tensors": lambda t: t.update({"rope_freqs.weight": np.ones(16, np.float32)})},
            r"surplus tensors: rope_freqs\.weight",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options, message, write):
    path = write(random_decoder("llama"), **options)
    with pytest.raises(ReadError, match=message) as caught:
        gguf.read(path)
    assert str(path) in str(caught.value)


def test_a_truncated_or_foreign_file_is_refused(write, tmp_path):
    path = write(random_decoder("gpt2"))
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 3, len(whole) - 5000):
        path.write_bytes(whole[:size])
        with pytest.raises(ReadError, match=str(path)):
            gguf.read(path)
    with pytest.raises(ReadError, match=r"absent\.gguf"):
        gguf.read(tmp_path / "absent.gguf")
