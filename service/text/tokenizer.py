"""The text side of a bundle: prompts and conversations to token ids, token ids to text."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from attendant.bundle import BundleError, Vocabulary
from service.errors import InvalidField, Unsupported
from service.text.chat_template import ChatTemplate
from service.text.detokenizer import Detokenizers, IncrementalDetokenizer
from service.text.encoded import EncodedText, lengths_within

_PRIVATE_USE = range(0xE000, 0xF900)


class TextCodec:
    """Turns text into the token ids of one bundle and back; safe to share between threads.

    Special tokens that a *prompt* spells out ("<|im_start|>") become those tokens: whoever sends a raw prompt
    writes the model's own format. What a *message* spells out stays text, so no message can end itself and
    speak in another role.

    Args:
        directory: a verified bundle.
        vocabulary: its manifest's vocabulary.

    Raises:
        BundleError: the tokenizer or the chat template cannot be used, or the vocabulary contradicts the
            tokenizer.
    """

    def __init__(self, directory: Path, vocabulary: Vocabulary) -> None:
        path = directory / vocabulary.file
        self._tokenizer = _load(path)
        self._literal = _load(path)
        self._literal.encode_special_tokens = True  # reads special tokens as the characters they are written with
        self._size = vocabulary.size
        if (count := self._tokenizer.get_vocab_size()) > vocabulary.size:
            raise BundleError(f"{path}: {count} tokens, but the model knows only {vocabulary.size}")
        self._detokenizers = Detokenizers(self._tokenizer)
        self._leading = self._leading_ids(vocabulary)
        self._template = self._chat_template(vocabulary)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: i for i, token in added.items() if token.special}
        self._special = _one_of(self._special_ids)

    @property
    def has_chat_template(self) -> bool:
        """Whether the bundle takes conversations."""
        return self._template is not None

    def encode_prompt(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Return the ids of a text, by default with the special tokens that belong around a prompt."""
        ids = _encode(self._tokenizer, text, add_special_tokens=add_special_tokens)
        return (*self._leading, *ids) if add_special_tokens else tuple(ids)

    def encode_text(self, text: str, pair: str | None = None, *, max_tokens: int | None = None) -> EncodedText:
        """Return a text, or a pair of texts, with all special tokens that belong around it.

        Args:
            text: the text, or the first of two.
            pair: the second text.
            max_tokens: cut the texts, the longer one first, so that no more tokens come of them; the special tokens
                stay.
        """
        inputs = [text] if pair is None else [text, pair]
        # As a batch, because only batches let other threads run meanwhile.
        pieces = self._tokenizer.encode_batch(inputs, add_special_tokens=False)
        lengths = [len(piece) for piece in pieces]
        around = len(self._leading) + self._tokenizer.num_special_tokens_to_add(is_pair=pair is not None)
        truncated = max_tokens is not None and sum(lengths) + around > max_tokens
        if max_tokens is not None and truncated:
            kept = lengths_within(lengths[0], sum(lengths[1:]), max(0, max_tokens - around))
            for piece, length in zip(pieces, kept, strict=False):
                piece.truncate(length)
        encoding = self._tokenizer.post_process(pieces[0], pieces[1] if len(pieces) > 1 else None)
        found = EncodedText.of_encoding(encoding, self._leading, truncated=truncated)
        return found.cut(max_tokens) if max_tokens is not None and len(found.token_ids) > max_tokens else found

    def encode_messages(self, messages: Sequence[tuple[str, str]]) -> tuple[str, tuple[int, ...]]:
        """Return a conversation as the bundle's template renders it, and its ids.

        Args:
            messages: pairs of role and content, oldest first.

        Raises:
            Unsupported: the bundle has no chat template.
            InvalidField: there is no message, or the template refuses the messages.
        """
        if self._template is None:
            raise Unsupported("messages: the model has no chat template; send a prompt")
        if not messages:
            raise InvalidField("messages", [], "at least one message is needed")
        if any(self._mentions_special(text) for message in messages for text in message):
            return self._encode_guarded(self._template, messages)
        rendered = self._template.render(messages)
        return rendered, tuple(_encode(self._tokenizer, rendered))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; an incomplete character becomes U+FFFD.

        Raises:
            InvalidField: an id is not of the vocabulary.
        """
        self.check_ids(token_ids)
        return self._tokenizer.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)[0]

    def check_ids(self, token_ids: Sequence[int], field: str = "token_ids") -> None:
        """Raise InvalidField, naming `field` and the position, if an id is not of the model's vocabulary."""
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self._size):
            i, bad = next((i, t) for i, t in enumerate(token_ids) if not 0 <= t < self._size)
            raise InvalidField(f"{field}[{i}]", bad, f"token ids go from 0 to {self._size - 1}")

    def token_text(self, token_id: int) -> str:
        """Return a token as the vocabulary spells it; empty if the model has ids that the tokenizer lacks."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_label(self, token_id: int) -> str:
        r"""Return a token as people read it; a byte that is no whole character is written as \xe2."""
        return self._detokenizers.label(token_id)

    def detokenizer(self) -> IncrementalDetokenizer:
        """Return the detokenizer of a new stream."""
        return self._detokenizers.open()

    def _leading_ids(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """Return what the manifest puts before a prompt and the tokenizer's own post-processor does not."""
        if not vocabulary.add_bos:
            return ()
        if vocabulary.bos_token_id is None:
            raise BundleError("vocabulary: add_bos without a bos_token_id")
        added = _encode(self._tokenizer, "", add_special_tokens=True)
        return () if added[:1] == [vocabulary.bos_token_id] else (vocabulary.bos_token_id,)

    def _chat_template(self, vocabulary: Vocabulary) -> ChatTemplate | None:
        if vocabulary.chat_template is None:
            return None
        ids = {
            "bos_token": vocabulary.bos_token_id,
            "eos_token": next(iter(vocabulary.eos_token_ids), None),
            "pad_token": vocabulary.pad_token_id,
        }
        tokens = {name: self.token_text(token_id) for name, token_id in ids.items() if token_id is not None}
        return ChatTemplate(vocabulary.chat_template, tokens)

    def _mentions_special(self, text: str) -> bool:
        normalizer = self._tokenizer.normalizer
        if self._special.search(text):
            return True
        return normalizer is not None and self._special.search(normalizer.normalize_str(text)) is not None

    def _encode_guarded(
        self, template: ChatTemplate, messages: Sequence[tuple[str, str]]
    ) -> tuple[str, tuple[int, ...]]:
        """Encode messages that spell out special tokens, which only the template may write.

        While the template runs, numbers between a character that no message uses stand for the spellings, so
        that every one in the rendered text is the template's; what lies between those is encoded as nothing
        but text.
        """
        used = {character for message in messages for text in message for character in text}
        mark = next((chr(code) for code in _PRIVATE_USE if chr(code) not in used), None)
        if mark is None:
            raise InvalidField("messages", "...", "they spell a special token and use every private-use character")
        spellings: list[str] = []

        def masked(text: str) -> str:
            def mask(match: re.Match[str]) -> str:
                spellings.append(match[0])
                return f"{mark}{len(spellings) - 1}{mark}"

            return self._special.sub(mask, text)

        def unmasked(text: str) -> str:
            return re.sub(f"{mark}([0-9]+){mark}", lambda match: spellings[int(match[1])], text)

        rendered = template.render([(masked(role), masked(content)) for role, content in messages])
        ids: list[int] = []
        for i, piece in enumerate(self._special.split(rendered)):  # text, special token, text, ..., text
            if i % 2:
                ids.append(self._special_ids[piece])
            elif piece:
                ids += _encode(self._literal, unmasked(piece))
        return unmasked(rendered), tuple(ids)


def _load(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises nothing more particular
        raise BundleError(f"{path}: not a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Return the ids of a text; as a batch of one, because only batches let other threads run meanwhile."""
    return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


def _one_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern, one group, that matches any of the strings, longest first; without any, nothing."""
    alternatives = "|".join(re.escape(string) for string in sorted(strings, key=len, reverse=True))
    return re.compile(f"({alternatives or '(?!)'})")
