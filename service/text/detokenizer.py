"""Token ids to text, one at a time, exactly as if the whole sequence were decoded at its end.

The deltas of a stream concatenate to `tokenizer.decode(ids)` for every sequence of ids, even one that no text
encodes to, and no delta ends inside a character. Both follow from how decoders work, so a decoder that works
otherwise is refused:

- byte-level decoders (GPT-2, Llama 3, SmolLM2) give every token a string of bytes, and the text is their
  UTF-8;
- the others (SentencePiece's, WordPiece's) give every token a piece of text that depends only on whether the
  token comes first; with byte fallback, neighbouring raw-byte tokens are decoded together, so they wait for
  the end of their run.

What a token contributes is looked up once per bundle and kept: an append costs a dictionary access.
"""

import codecs
import json
import re
from typing import Any, Protocol

from tokenizers import Tokenizer

from attendant.bundle import BundleError

_RAW_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class IncrementalDetokenizer(Protocol):
    """The text of one growing sequence of token ids; special tokens have none."""

    def append(self, token_id: int) -> str:
        """Return the text that is certain now and was not before; often one token's, sometimes none."""

    def flush(self) -> str:
        """Return what is left at the end; an incomplete character becomes U+FFFD."""


class Detokenizers:
    """Makes the detokenizers of one tokenizer, which share what its tokens contribute.

    Raises:
        BundleError: the tokenizer's decoder is of a kind that cannot be followed token by token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        steps = _decoder_steps(tokenizer)
        kinds = [step["type"] for step in steps]
        self._bytes = _TokenBytes(tokenizer) if kinds == ["ByteLevel"] else None
        if self._bytes is None:
            _check_local(steps)
            self._pieces = _TokenPieces(tokenizer, byte_fallback="ByteFallback" in kinds)

    def open(self) -> IncrementalDetokenizer:
        """Return the detokenizer of a new sequence."""
        if self._bytes is not None:
            return _ByteDetokenizer(self._bytes)
        return _PieceDetokenizer(self._pieces)

    def label(self, token_id: int) -> str:
        r"""Return a token by itself: its text, a byte that is no whole character as \xe2, or else as it is spelt."""
        content = b"" if self._bytes is None else self._bytes[token_id]
        if content:
            return content.decode("utf-8", errors="backslashreplace")
        return self._tokenizer.id_to_token(token_id) or f"<{token_id}>"


class _TokenBytes(dict[int, bytes]):
    """The bytes of each token id seen so far, under a byte-level decoder."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._special = _special_ids(tokenizer)
        self._byte_of = _byte_alphabet()

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        if token is None:
            content = b""
        elif all(character in self._byte_of for character in token):
            content = bytes(self._byte_of[character] for character in token)
        else:  # an added token, spelt as itself
            content = token.encode()
        self[token_id] = content
        return content


class _ByteDetokenizer:
    """UTF-8 decoding that waits for the rest of a character, three bytes at most."""

    __slots__ = ("_bytes", "_utf8")

    def __init__(self, token_bytes: _TokenBytes) -> None:
        self._bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def append(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes[token_id])

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _TokenPieces(dict[int, str | None]):
    """The text of each token id seen so far, when it is not the first one; None for ids without text."""

    def __init__(self, tokenizer: Tokenizer, *, byte_fallback: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._special = _special_ids(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self.raw_bytes = frozenset(
            token_id for token, token_id in vocabulary.items() if byte_fallback and _RAW_BYTE.fullmatch(token)
        )
        # Something ordinary to put in front, so that a piece is not decoded as the first one.
        ordinary = (i for i in sorted(vocabulary.values()) if i not in self._special and i not in self.raw_bytes)
        self._anchor = next((i for i in ordinary if tokenizer.decode([i]).isalnum()), None)
        self._anchor_text = "" if self._anchor is None else tokenizer.decode([self._anchor])

    def __missing__(self, token_id: int) -> str | None:
        known = token_id not in self._special and self._tokenizer.id_to_token(token_id) is not None
        piece = self.text([token_id], is_first=False) if known else None
        self[token_id] = piece
        return piece

    def text(self, token_ids: list[int], *, is_first: bool) -> str:
        """Return the text of a run of ids."""
        if is_first or self._anchor is None:
            return self._tokenizer.decode(token_ids)
        return self._tokenizer.decode([self._anchor, *token_ids])[len(self._anchor_text) :]


class _PieceDetokenizer:
    """Pieces as they come; a run of raw bytes as a whole, because one bad byte changes all of it."""

    __slots__ = ("_is_first", "_pieces", "_run")

    def __init__(self, pieces: _TokenPieces) -> None:
        self._pieces = pieces
        self._run: list[int] = []
        self._is_first = True

    def append(self, token_id: int) -> str:
        if token_id in self._pieces.raw_bytes:
            self._run.append(token_id)
            return ""
        piece = self._pieces[token_id]
        if piece is None:
            return ""
        if self._is_first or self._run:
            self._run.append(token_id)
            return self.flush()
        return piece

    def flush(self) -> str:
        if not self._run:
            return ""
        text = self._pieces.text(self._run, is_first=self._is_first)
        self._run, self._is_first = [], False
        return text


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    decoder = json.loads(tokenizer.to_str())["decoder"]

    def flat(step: dict[str, Any]) -> list[dict[str, Any]]:
        return [s for inner in step["decoders"] for s in flat(inner)] if step["type"] == "Sequence" else [step]

    return [] if decoder is None else flat(decoder)


def _check_local(steps: list[dict[str, Any]]) -> None:
    """Refuse decoders in which a token's text depends on more than its run of raw bytes and being first."""
    kinds = [step["type"] for step in steps]
    if len(kinds) <= 1 and set(kinds) <= {"Metaspace", "WordPiece"}:
        return
    sentencepiece = re.fullmatch(r"(Replace )*(ByteFallback )?(Fuse )?(Strip )?", "".join(f"{kind} " for kind in kinds))
    strips_little = all(step["start"] <= 1 and step["stop"] == 0 for step in steps if step["type"] == "Strip")
    if not (sentencepiece and strips_little):
        raise BundleError(f"the tokenizer's decoder {kinds} cannot be followed token by token")


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def _byte_alphabet() -> dict[str, int]:
    """Return which byte each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for the characters from
    U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
