"""Tokens as a reader knows them: what a token stands for in the text, not how its tokenizer spells it."""

import json
from collections.abc import Iterable
from functools import cache

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel


def token_texts(tokenizer: Tokenizer, token_ids: Iterable[int]) -> list[str]:
    r"""Return the text of each token by itself; a byte that is no whole character is written as \xe2.

    Tokens of other than byte-level tokenizers are returned as they are spelt.
    """
    tokens = [tokenizer.id_to_token(token_id) or f"<{token_id}>" for token_id in token_ids]
    return [_decoded(token) for token in tokens] if _is_byte_level(tokenizer) else tokens


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    return "ByteLevel" in {step.get("type") for step in (decoder, *decoder.get("decoders", ()))}


def _decoded(token: str) -> str:
    table = _bytes_by_character()
    if not all(character in table for character in token):  # a special token, which stands for itself
        return token
    return bytes(table[character] for character in token).decode("utf-8", errors="backslashreplace")


@cache
def _bytes_by_character() -> dict[str, int]:
    """Invert GPT-2's spelling of bytes: those that can be seen stand for themselves, the others follow from 256 on."""
    alphabet = set(ByteLevel.alphabet())
    hidden = (byte for byte in range(256) if chr(byte) not in alphabet)
    return {chr(byte): byte for byte in range(256) if chr(byte) in alphabet} | {
        chr(256 + place): byte for place, byte in enumerate(hidden)
    }
