"""`InferenceService`: generating, tokenising, detokenising; `encoding` has what encoders answer."""

import grpc
from google.protobuf.message import Message

from attendant.v1 import explain_pb2
from attendant.v1 import generation_pb2 as pb
from attendant.v1 import inference_service_pb2 as service_pb
from service.errors import InvalidField
from service.metrics import ServerMetrics
from service.rpc.catalog import ModelCatalog
from service.rpc.convert import (
    Conversation,
    check_bytes,
    read_conversation,
)
from service.rpc.encoding import EncodingMethods
from service.rpc.explaining import Explaining
from service.rpc.generate import Generating
from service.rpc.registration import Context
from service.rpc.workers import TextWorkers
from service.text import TextCodec

# What metrics call a method, where that is not its name.
_TASKS = {"TagTokens": "tag", "FillMask": "fill_mask"}


class InferenceService(EncodingMethods):
    """Answers calls; knows what the catalog serves and nothing of how it came there.

    Args:
        catalog: the models.
        workers: threads for text.
        explainers: threads for explain graphs.
        metrics: where calls that reach no model are counted too.
        max_prompt_bytes: of text in one prompt or conversation.
    """

    def __init__(
        self,
        catalog: ModelCatalog,
        workers: TextWorkers,
        explainers: TextWorkers,
        metrics: ServerMetrics,
        max_prompt_bytes: int,
    ) -> None:
        super().__init__(catalog, workers, metrics, max_prompt_bytes)
        self._explaining = Explaining(catalog, workers, explainers, metrics, max_prompt_bytes)
        self._generating = Generating(catalog, workers, explainers, metrics, max_prompt_bytes)

    def ended(self, method: str, request: Message | None, code: grpc.StatusCode) -> None:
        """Count a call."""
        label = None if request is None else self._catalog.label(request.model)  # type: ignore[attr-defined]  # all have it
        self._metrics.answered(label, _TASKS.get(method, method.lower()), code.name)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Write Started, Deltas, Finished."""
        await self._generating.answer(request, context)

    async def Explain(self, request: explain_pb2.ExplainRequest, context: Context) -> None:
        """Write the Explanation, then all HeadWeights."""
        await self._explaining.answer(request, context)

    async def Tokenize(self, request: service_pb.TokenizeRequest, context: Context) -> service_pb.TokenizeResponse:
        """Return token ids exactly as Generate would make them."""
        model = self._catalog.resolve(request.model)
        codec = model.codec
        kind = request.WhichOneof("input")
        if kind == "text":
            check_bytes("text", self._max_prompt_bytes, request.text)
            adds = not request.HasField("add_special_tokens") or request.add_special_tokens
            return await self._workers.run(
                lambda: _tokens(codec, codec.encode_prompt(request.text, add_special_tokens=adds))
            )
        if kind == "messages":
            if request.HasField("add_special_tokens"):
                raise InvalidField("add_special_tokens", request.add_special_tokens, "must be absent with messages")
            conversation = read_conversation(
                request.messages, max_bytes=self._max_prompt_bytes, capacity=model.loop.capacity
            )
            return await self._workers.run(lambda: _rendered(codec, conversation))
        raise InvalidField("input", kind, "one of text, messages is needed")

    async def Detokenize(
        self, request: service_pb.DetokenizeRequest, context: Context
    ) -> service_pb.DetokenizeResponse:
        """Return the text of token ids."""
        model = self._catalog.resolve(request.model)
        limit = model.found.manifest.limits.max_model_len
        if len(request.token_ids) > limit:
            raise InvalidField("token_ids", f"{len(request.token_ids)} ids", f"at most max_model_len, {limit}")
        skips = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        text = await self._workers.run(lambda: model.codec.decode(request.token_ids, skip_special_tokens=skips))
        return service_pb.DetokenizeResponse(text=text)


def _tokens(codec: TextCodec, token_ids: tuple[int, ...], text: str = "") -> service_pb.TokenizeResponse:
    spelt = [codec.token_text(token_id) for token_id in token_ids]
    return service_pb.TokenizeResponse(token_ids=token_ids, tokens=spelt, text=text)


def _rendered(codec: TextCodec, conversation: Conversation) -> service_pb.TokenizeResponse:
    text, token_ids = codec.encode_messages(conversation.messages)
    return _tokens(codec, token_ids, text)
