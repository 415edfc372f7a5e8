"""The tokenizer of a GGUF file: byte-level byte-pair encoding, rebuilt as a Hugging Face tokenizers file."""

from collections.abc import Mapping
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from models.checkpoint import TokenizerInfo
from models.readers.errors import ReadError

ROUND_TRIP = "Hello world,  it's 12345 days — naïve café\n\tx += 1;"


def read_tokenizer(metadata: Mapping[str, Any]) -> TokenizerInfo:
    """Translate the `tokenizer.*` metadata of a GGUF file.

    Raises:
        ReadError: the tokenizer is not byte-level BPE, its pre-tokenizer is unknown, a field is missing or malformed,
            or what was built does not give back the text it encodes.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ReadError(f"tokenizer.ggml.model is {kind!r}; only 'gpt2' (byte-level BPE) can be read")
    try:
        tokens = list(metadata["tokenizer.ggml.tokens"])
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    except KeyError as error:
        raise ReadError(f"the metadata lacks {error.args[0]}") from error
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ReadError(f"tokenizer.ggml.tokens has {len(tokens) - len(vocabulary)} repeated tokens")
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the Rust library raises bare exceptions
        raise ReadError(f"tokenizer.ggml.merges do not fit the tokens: {error}") from error
    tokenizer.pre_tokenizer = _pre_tokenizer(metadata)
    tokenizer.decoder = decoders.ByteLevel()
    _add_special_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type"))
    if (text := tokenizer.decode(tokenizer.encode(ROUND_TRIP).ids)) != ROUND_TRIP:
        raise ReadError(f"the tokenizer turns {ROUND_TRIP!r} into {text!r}")
    end_ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return TokenizerInfo(
        json=tokenizer.to_str(),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(token_id for token_id in end_ids if token_id is not None)),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _pre_tokenizer(metadata: Mapping[str, Any]) -> pre_tokenizers.PreTokenizer:
    """Return how text is split before merges: by GPT-2's pattern, which `ByteLevel` contains."""
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(metadata.get("tokenizer.ggml.add_space_prefix", False)), use_regex=True
    )
    name = metadata.get("tokenizer.ggml.pre")
    if name == "gpt-2":
        return byte_level
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    raise ReadError(f"tokenizer.ggml.pre is {name!r}; known pre-tokenizers are 'gpt-2' and 'smollm'")


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int] | None) -> None:
    """Match control and user-defined tokens whole, before any splitting; they keep their ids."""
    if types is None:
        return
    if len(types) != len(tokens):
        raise ReadError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    typed = list(zip(tokens, types, strict=True))
    control = [token for token, kind in typed if kind in (TokenType.CONTROL, TokenType.UNKNOWN)]
    defined = [token for token, kind in typed if kind == TokenType.USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in defined])
