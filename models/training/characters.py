"""Tokenizers of pairs: a source of characters, a target of characters or of words; special tokens as in `pairs`."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.decoders import Fuse

from models.checkpoint import TokenizerInfo
from models.training.pairs import END, PAD, SPECIAL_TOKENS, START


def character_tokenizer(texts: Iterable[str], *, lowercase: bool = False) -> Tokenizer:
    """Return a tokenizer that knows every character of `texts`; others become the padding token, which is ignored."""
    known = (text.lower() if lowercase else text for text in texts)
    tokenizer = _word_level(sorted({character for text in known for character in text}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def word_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Return a tokenizer that knows every word of `texts`, words being what white space separates."""
    tokenizer = _word_level(sorted({word for text in texts for word in text.split()}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def tokenizer_info(tokenizer: Tokenizer) -> TokenizerInfo:
    """Return what a checkpoint keeps of a tokenizer of pairs."""
    return TokenizerInfo(
        json=tokenizer.to_str(),
        bos_token_id=START,
        eos_token_ids=(END,),
        pad_token_id=PAD,
        add_bos=False,
        chat_template=None,
    )


def _word_level(words: list[str]) -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *words))}
    return Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[PAD]))
