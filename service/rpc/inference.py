"""`InferenceService`: generating, tokenising, detokenising; `encoding` has what encoders answer."""

import asyncio
import itertools
from dataclasses import dataclass

import grpc
from google.protobuf.message import Message

from attendant.v1 import generation_pb2 as pb
from attendant.v1 import inference_service_pb2 as service_pb
from service.engine_loop import EngineLoop, TokenStream
from service.errors import AttendantError, InvalidField
from service.metrics import ServerMetrics
from service.rpc.answer import Answer, wire_reason
from service.rpc.catalog import ModelCatalog, ServedModel
from service.rpc.convert import (
    Conversation,
    Options,
    Prompt,
    PromptText,
    PromptTokens,
    check_bytes,
    read_conversation,
    read_input,
    read_options,
    to_request,
)
from service.rpc.encoding import EncodingMethods
from service.rpc.registration import Context, ended_by
from service.rpc.status import to_duration
from service.rpc.workers import TextWorkers
from service.text import TextCodec


@dataclass(slots=True)
class _Accepted:
    """A request that the engine has taken."""

    model: ServedModel
    options: Options
    stream: TokenStream
    prompt_text: str  # empty unless it is to be echoed
    arrival: float
    tokenise_seconds: float


# What metrics call a method, where that is not its name.
_TASKS = {"TagTokens": "tag", "FillMask": "fill_mask"}


class InferenceService(EncodingMethods):
    """Answers calls; knows what the catalog serves and nothing of how it came there.

    Args:
        catalog: the models.
        workers: threads for text.
        metrics: where calls that reach no model are counted too.
        max_prompt_bytes: of text in one prompt or conversation.
    """

    def __init__(
        self, catalog: ModelCatalog, workers: TextWorkers, metrics: ServerMetrics, max_prompt_bytes: int
    ) -> None:
        super().__init__(catalog, workers, metrics, max_prompt_bytes)
        self._numbers = itertools.count(1)

    def ended(self, method: str, request: Message | None, code: grpc.StatusCode) -> None:
        """Count a call."""
        label = None if request is None else self._catalog.label(request.model)  # type: ignore[attr-defined]  # all have it
        self._metrics.answered(label, _TASKS.get(method, method.lower()), code.name)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Write Started, Deltas, Finished."""
        try:
            accepted = await self._accept(request, context)
        except AttendantError as error:
            self._metrics.turned_away(self._catalog.label(request.model), error.reason.lower())
            raise
        metrics = accepted.model.metrics
        try:
            await self._answer(accepted, context)
        except asyncio.CancelledError:
            metrics.failed("deadline" if ended_by(context) is grpc.StatusCode.DEADLINE_EXCEEDED else "cancelled")
            raise
        except Exception:
            metrics.failed("error")
            raise
        finally:
            accepted.stream.cancel()

    async def _accept(self, message: pb.GenerateRequest, context: Context) -> _Accepted:
        """Check a request, tokenise it and hand it to the engine."""
        arrival = EngineLoop.clock()
        model = self._catalog.resolve(message.model)
        engine = model.engine
        options = read_options(message, model.found.manifest)
        prompt = read_input(
            message,
            max_bytes=self._max_prompt_bytes,
            capacity=engine.capacity,
            capacity_name=engine.capacity_name,
        )
        if isinstance(prompt, PromptTokens):
            model.codec.check_ids(prompt.token_ids, "token_ids.ids")
        token_ids, text = await self._encode(model.codec, prompt, echo=options.echo)
        remaining = context.time_remaining()
        request = to_request(
            options,
            token_ids,
            engine_id=f"{next(self._numbers)}/{options.request_id}",
            capacity=engine.capacity,
            arrival=arrival,
            deadline=None if remaining is None else engine.clock() + remaining,
        )
        stream = engine.submit(request)
        return _Accepted(model, options, stream, text, arrival, engine.clock() - arrival)

    async def _encode(self, codec: TextCodec, prompt: Prompt, *, echo: bool) -> tuple[tuple[int, ...], str]:
        """Return the prompt's tokens, and its text if it is to be echoed."""
        match prompt:
            case PromptTokens(token_ids):
                return token_ids, await self._workers.run(lambda: codec.decode(token_ids)) if echo else ""
            case PromptText(text):
                return await self._workers.run(lambda: codec.encode_prompt(text)), text if echo else ""
            case Conversation(messages):
                rendered, token_ids = await self._workers.run(lambda: codec.encode_messages(messages))
                return token_ids, rendered if echo else ""

    async def _answer(self, accepted: _Accepted, context: Context) -> None:
        request = accepted.stream.request
        started = pb.Started(
            request_id=accepted.options.request_id,
            prompt_tokens=len(request.prompt),
            seed=request.sampling.seed,
            model=accepted.model.key,
        )
        await context.write(pb.GenerateResponse(started=started))
        if accepted.prompt_text:
            await context.write(pb.GenerateResponse(delta=pb.Delta(text=accepted.prompt_text)))
        answer = Answer(accepted.model.codec, accepted.options)
        async for item in accepted.stream:
            delta = answer.delta(item)
            if answer.finish_reason is None:
                await context.write(delta)
                continue
            accepted.stream.cancel()  # after a stop string the engine does not know yet that this is the end
            ended = EngineLoop.clock()
            await context.write(delta)
            await context.write(pb.GenerateResponse(finished=_finished(accepted, answer, ended)))
            accepted.model.metrics.succeeded(
                answer.finish_reason.value, len(request.prompt), answer.num_tokens, ended - accepted.arrival
            )
            return
        raise AssertionError(f"the stream of request {request.request_id} ended without a finish")

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


def _finished(accepted: _Accepted, answer: Answer, ended: float) -> pb.Finished:
    assert answer.finish_reason is not None
    stream = accepted.stream
    first_token = accepted.arrival + stream.queue_seconds + stream.prefill_seconds
    return pb.Finished(
        finish_reason=wire_reason(answer.finish_reason),
        usage=pb.Usage(prompt_tokens=len(stream.request.prompt), output_tokens=answer.num_tokens),
        timings=pb.Timings(
            queue=to_duration(stream.queue_seconds - accepted.tokenise_seconds),  # the engine counts from arrival
            tokenise=to_duration(accepted.tokenise_seconds),
            prefill=to_duration(stream.prefill_seconds),
            decode=to_duration(ended - first_token),
            total=to_duration(ended - accepted.arrival),
        ),
    )
