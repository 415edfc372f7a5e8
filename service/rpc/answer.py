"""From tokens to the messages of one answer: text that never ends inside a character or a stop string."""

from attendant.v1 import generation_pb2 as pb
from service.rpc.convert import Options
from service.scheduling.request import FinishReason, Token
from service.text import StopStrings, TextCodec
from service.token_stream import StepTokens

_WIRE_REASON = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.EOS: pb.FINISH_REASON_EOS,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


def wire_reason(reason: FinishReason) -> pb.FinishReason:
    """Return a reason as the API spells it."""
    return _WIRE_REASON[reason]


class Answer:
    """Assembles the deltas of one answer.

    Stop strings are looked for in the text of the tokens from the `min_tokens`-th on. A token that ends the answer
    (end of sequence, stop token) has no text.
    """

    def __init__(self, codec: TextCodec, options: Options) -> None:
        self._detokenizer = codec.detokenizer()
        self._stops = StopStrings(options.stop_strings) if options.stop_strings else None
        self._min_tokens = options.min_tokens
        self._logprobs = options.logprobs
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    def delta(self, item: StepTokens) -> pb.GenerateResponse:
        """Return what a step's tokens add; sets `finish_reason` when the answer is complete.

        Tokens after the one that completes a stop string are dropped.
        """
        response = pb.GenerateResponse()
        delta = response.delta
        text: list[str] = []
        token_ids: list[int] = []
        finish = item.finish
        # Only the last token of an item can be one that ends the answer.
        silent = len(item.tokens) - 1 if finish is not None and finish.reason is not FinishReason.LENGTH else -1
        for i, token in enumerate(item.tokens):
            self.num_tokens += 1
            token_ids.append(token.token_id)
            if self._logprobs:
                delta.logprobs.append(_logprob(token))
            if i != silent and self._take(self._detokenizer.append(token.token_id), text):
                break
        if self.finish_reason is None and finish is not None:
            self.finish_reason = finish.reason
            self._flush(text)
        delta.token_ids.extend(token_ids)
        delta.text = "".join(text)
        return response

    def _take(self, piece: str, text: list[str]) -> bool:
        """Add a piece of text, as far as it comes before a stop string; return whether one is complete."""
        if not piece:
            return False
        if self._stops is None or self.num_tokens < self._min_tokens:
            text.append(piece)
            return False
        text.append(self._stops.append(piece))
        if self._stops.matched is None:
            return False
        self.finish_reason = FinishReason.STOP
        return True

    def _flush(self, text: list[str]) -> None:
        """Add what was held back."""
        if not self._take(self._detokenizer.flush(), text) and self._stops is not None:
            text.append(self._stops.flush())


def _logprob(token: Token) -> pb.TokenLogprob:
    top = [pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.top]
    return pb.TokenLogprob(token_id=token.token_id, logprob=token.logprob, top=top)
