"""A text, or a pair of texts, as a model reads it."""

from dataclasses import dataclass, replace
from typing import Self

from tokenizers import Encoding


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedText:
    """The tokens of a text or pair, and what is known of each of them.

    `segment_ids` say of a pair's tokens which text they belong to, 0 or 1; `offsets` are half-open ranges of characters
    in their text; `is_special` is true of tokens that were added around the texts. All are as long as `token_ids`.
    """

    token_ids: tuple[int, ...]
    segment_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    is_special: tuple[bool, ...]
    truncated: bool = False

    @classmethod
    def of_ids(cls, token_ids: tuple[int, ...]) -> Self:
        """Return ids that a caller has chosen."""
        count = len(token_ids)
        return cls(
            token_ids=token_ids,
            segment_ids=(0,) * count,
            offsets=((0, 0),) * count,
            is_special=(False,) * count,
        )

    @classmethod
    def of_encoding(cls, encoding: Encoding, leading: tuple[int, ...], *, truncated: bool) -> Self:
        """Return what the tokenizer made, with special tokens put before it."""
        count = len(leading)
        return cls(
            token_ids=(*leading, *encoding.ids),
            segment_ids=(*(0,) * count, *encoding.type_ids),
            offsets=(*((0, 0),) * count, *encoding.offsets),
            is_special=(*(True,) * count, *(bool(flag) for flag in encoding.special_tokens_mask)),
            truncated=truncated,
        )

    def cut(self, max_tokens: int) -> Self:
        """Return the first tokens."""
        return replace(
            self,
            token_ids=self.token_ids[:max_tokens],
            segment_ids=self.segment_ids[:max_tokens],
            offsets=self.offsets[:max_tokens],
            is_special=self.is_special[:max_tokens],
            truncated=True,
        )


def lengths_within(first: int, second: int, max_tokens: int) -> tuple[int, int]:
    """Return how many tokens two texts keep so that both have at most `max_tokens`: the longer one loses first."""
    if first + second <= max_tokens:
        return first, second
    longer = max(max_tokens - min(first, second), max_tokens - max_tokens // 2)
    shorter = max_tokens - longer
    return (longer, shorter) if first > second else (shorter, longer)
