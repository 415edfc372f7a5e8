"""One call of `Generate`: checked, tokenised, handed to the engine, and its events written as they come."""

import asyncio
import itertools
from dataclasses import dataclass

import grpc

from attendant.v1 import generation_pb2 as pb
from service.engine_loop import EngineLoop
from service.errors import AttendantError, DeadlineExceeded, DeadlineUnreachable, InvalidField, TextTooLong
from service.metrics import ServerMetrics
from service.rpc.alignment import Alignment
from service.rpc.answer import Answer, wire_reason
from service.rpc.catalog import ModelCatalog, ServedModel
from service.rpc.convert import (
    Conversation,
    Inputs,
    Options,
    PromptImage,
    PromptText,
    PromptTokens,
    check_width,
    read_inputs,
    read_options,
    to_request,
)
from service.rpc.pixels import read_file
from service.rpc.registration import Context, ended_by
from service.rpc.status import to_duration
from service.rpc.urgency import tenant_of
from service.rpc.workers import TextWorkers
from service.scheduling.request import Finish, Source
from service.token_stream import TokenStream


@dataclass(slots=True)
class _Accepted:
    """A request that the engine has taken."""

    model: ServedModel
    options: Options
    stream: TokenStream
    prompt_text: str  # empty unless it is to be echoed
    arrival: float
    tokenise_seconds: float


@dataclass(frozen=True, slots=True)
class _Encoded:
    """The tokens of a prompt, its text if it is to be echoed, and what the answer is about."""

    token_ids: tuple[int, ...]
    text: str
    source: Source | None


class Generating:
    """Answers calls of `Generate`.

    Args:
        catalog: the models.
        workers: threads for text and images.
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
        self._catalog = catalog
        self._workers = workers
        self._explainers = explainers
        self._metrics = metrics
        self._max_prompt_bytes = max_prompt_bytes
        self._numbers = itertools.count(1)

    async def answer(self, request: pb.GenerateRequest, context: Context) -> None:
        """Write Started, Deltas, Finished."""
        try:
            accepted = await self._accept(request, context)
        except AttendantError as error:
            self._metrics.turned_away(self._catalog.label(request.model), error.reason.lower())
            raise
        metrics = accepted.model.metrics
        try:
            await self._write(accepted, context)
        except asyncio.CancelledError:
            metrics.failed("deadline" if ended_by(context) is grpc.StatusCode.DEADLINE_EXCEEDED else "cancelled")
            raise
        except DeadlineUnreachable as error:
            self._metrics.turned_away(accepted.model.key, error.reason.lower())
            raise
        except DeadlineExceeded:
            metrics.failed("deadline")
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
        engine, manifest = model.engine, model.found.manifest
        options = read_options(message, manifest)
        check_width(options, engine.num_slots)
        inputs = read_inputs(
            message,
            manifest,
            max_bytes=self._max_prompt_bytes,
            capacity=engine.capacity,
            capacity_name=engine.capacity_name,
        )
        encoded = await self._workers.run(lambda: _encode(model, inputs, echo=options.echo))
        remaining = context.time_remaining()
        request = to_request(
            options,
            encoded.token_ids,
            engine_id=f"{next(self._numbers)}/{options.request_id}",
            capacity=engine.capacity,
            arrival=arrival,
            deadline=None if remaining is None else engine.clock() + remaining,
            source=encoded.source,
            tenant=tenant_of(context),
        )
        stream = engine.submit(request)
        return _Accepted(model, options, stream, encoded.text, arrival, engine.clock() - arrival)

    async def _write(self, accepted: _Accepted, context: Context) -> None:
        request = accepted.stream.request
        started = pb.Started(
            request_id=accepted.options.request_id,
            prompt_tokens=request.num_prompt,
            seed=request.sampling.seed,
            model=accepted.model.key,
        )
        alignment = None
        if accepted.options.alignment:
            alignment = Alignment(accepted.model, request, self._explainers)
            started.source_labels.extend(alignment.labels)
        await context.write(pb.GenerateResponse(started=started))
        if accepted.prompt_text:
            await context.write(pb.GenerateResponse(delta=pb.Delta(text=accepted.prompt_text)))
        answer = Answer(accepted.model.codec, accepted.options)
        async for item in accepted.stream:
            if item.finish is not None and item.finish.hypotheses:
                await self._write_found(accepted, item.finish, context)
                return
            delta = answer.delta(item)
            if alignment is not None:
                delta.delta.alignment.extend(await alignment.of_next(delta.delta.token_ids))
            if answer.finish_reason is None:
                await context.write(delta)
                continue
            accepted.stream.cancel()  # after a stop string the engine does not know yet that this is the end
            ended = EngineLoop.clock()
            await context.write(delta)
            finished = _finished(accepted, answer.num_tokens, ended)
            finished.finish_reason = wire_reason(answer.finish_reason)
            await context.write(pb.GenerateResponse(finished=finished))
            accepted.model.metrics.succeeded(
                answer.finish_reason.value,
                request.num_prompt,
                answer.num_tokens,
                ended - accepted.arrival,
                first_token_seconds=accepted.stream.queue_seconds + accepted.stream.prefill_seconds,
                has_deadline=request.deadline is not None,
                request_id=accepted.options.request_id,
            )
            return
        raise AssertionError(f"the stream of request {request.request_id} ended without a finish")

    async def _write_found(self, accepted: _Accepted, finish: Finish, context: Context) -> None:
        """Write the answers of a beam search, the best first."""
        ended, codec, request = EngineLoop.clock(), accepted.model.codec, accepted.stream.request
        for index, found in enumerate(finish.hypotheses):
            told = found.token_ids[:-1] if found.token_ids[-1] in request.end_token_ids else found.token_ids
            delta = pb.Delta(index=index, text=codec.decode(told), token_ids=found.token_ids)
            await context.write(pb.GenerateResponse(delta=delta))
            finished = _finished(accepted, len(found.token_ids), ended)
            finished.index = index
            finished.finish_reason = wire_reason(found.reason)
            finished.score, finished.log_likelihood = found.score, found.log_likelihood
            await context.write(pb.GenerateResponse(finished=finished))
        accepted.model.metrics.succeeded(
            finish.reason.value,
            request.num_prompt,
            sum(len(found.token_ids) for found in finish.hypotheses),
            ended - accepted.arrival,
            has_deadline=request.deadline is not None,
            request_id=accepted.options.request_id,
        )


def _encode(model: ServedModel, inputs: Inputs, *, echo: bool) -> _Encoded:
    """Turn source and prompt into what the engine takes; runs in a thread."""
    source = _source(model, inputs)
    codec = model.codec
    token_ids: tuple[int, ...]
    text = ""
    match inputs.prompt:
        case None:
            token_ids = ()
        case PromptTokens(token_ids):
            codec.check_ids(token_ids, "token_ids.ids")
            text = codec.decode(token_ids) if echo else ""
        case PromptText(prompt):
            token_ids, text = codec.encode_prompt(prompt), prompt
        case Conversation(messages):
            text, token_ids = codec.encode_messages(messages)
    if source is not None:
        token_ids = (_start_token(model), *token_ids)
    return _Encoded(token_ids, text if echo else "", source)


def _start_token(model: ServedModel) -> int:
    vocabulary = model.found.manifest.vocabulary
    assert vocabulary is not None and vocabulary.bos_token_id is not None, "the schema demands both where a source is"
    return vocabulary.bos_token_id


def _source(model: ServedModel, inputs: Inputs) -> Source | None:
    manifest = model.found.manifest
    match inputs.source:
        case None:
            return None
        case PromptImage(content):
            assert manifest.image is not None, "the schema demands it of a graph that takes images"
            return Source(pixels=read_file("image", content, manifest.image).tobytes())
        case PromptTokens(token_ids):
            model.source_codec.check_ids(token_ids, "token_ids.ids")
        case PromptText(text):
            token_ids = model.source_codec.encode_prompt(text)
    limit = manifest.limits.max_source_len
    if not token_ids:
        raise InvalidField(inputs.source_field, "", "it has no tokens")
    if limit is not None and len(token_ids) > limit:
        raise TextTooLong(
            field=inputs.source_field,
            tokens=len(token_ids),
            limit=limit,
            limit_name="max_source_len",
            advice="shorten it, or send it in parts",
        )
    return Source(token_ids)


def _finished(accepted: _Accepted, num_tokens: int, ended: float) -> pb.Finished:
    stream = accepted.stream
    first_token = accepted.arrival + stream.queue_seconds + stream.prefill_seconds
    return pb.Finished(
        usage=pb.Usage(
            prompt_tokens=stream.request.num_prompt, cached_tokens=stream.cached_tokens, output_tokens=num_tokens
        ),
        timings=pb.Timings(
            queue=to_duration(stream.queue_seconds - accepted.tokenise_seconds),  # the engine counts from arrival
            tokenise=to_duration(accepted.tokenise_seconds),
            prefill=to_duration(stream.prefill_seconds),
            decode=to_duration(ended - first_token),
            total=to_duration(ended - accepted.arrival),
        ),
    )
