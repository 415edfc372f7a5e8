"""Text in, token ids out, and back: tokenising, chat templates, incremental detokenising, stop strings.

It knows no request and no stream; whoever calls it bounds the bytes that come in.
"""

from service.text.detokenizer import IncrementalDetokenizer
from service.text.encoded import EncodedText
from service.text.stopping import StopStrings
from service.text.tokenizer import TextCodec

__all__ = ["EncodedText", "IncrementalDetokenizer", "StopStrings", "TextCodec"]
