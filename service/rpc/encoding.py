"""The RPCs of encoders: embedding, classifying, tagging, filling gaps, scoring. They differ in their `EncodeTask`."""

import asyncio
from typing import Any

import grpc
from google.protobuf.message import Message

from attendant.v1 import classification_pb2, embedding_pb2, fill_mask_pb2, scoring_pb2, tagging_pb2
from service.encode_loop import EncodeLoop
from service.errors import AttendantError, DeadlineExceeded, DeadlineUnreachable
from service.metrics import ServerMetrics
from service.rpc.catalog import ModelCatalog
from service.rpc.classify import CLASSIFY
from service.rpc.embed import EMBED
from service.rpc.encode_task import Answer, EncodeTask, Reading
from service.rpc.fill_mask import FILL_MASK
from service.rpc.registration import Context, ended_by
from service.rpc.score import SCORE
from service.rpc.tag import TAG
from service.rpc.texts import timings_of, usage_of
from service.rpc.urgency import read_urgency
from service.rpc.workers import TextWorkers


class EncodingMethods:
    """The part of `InferenceService` that encoders answer.

    Args:
        catalog: the models.
        workers: threads for text.
        metrics: where calls that reach no model are counted too.
        max_prompt_bytes: of text in one call.
    """

    def __init__(
        self, catalog: ModelCatalog, workers: TextWorkers, metrics: ServerMetrics, max_prompt_bytes: int
    ) -> None:
        self._catalog = catalog
        self._workers = workers
        self._metrics = metrics
        self._max_prompt_bytes = max_prompt_bytes

    async def Embed(self, request: embedding_pb2.EmbedRequest, context: Context) -> Message:
        """Return a vector for each text."""
        return await self._run(EMBED, request, context)

    async def Classify(self, request: classification_pb2.ClassifyRequest, context: Context) -> Message:
        """Return the classes of each text or image."""
        return await self._run(CLASSIFY, request, context)

    async def TagTokens(self, request: tagging_pb2.TagTokensRequest, context: Context) -> Message:
        """Return a label for each token of each text."""
        return await self._run(TAG, request, context)

    async def FillMask(self, request: fill_mask_pb2.FillMaskRequest, context: Context) -> Message:
        """Return what might stand in the gaps of each text."""
        return await self._run(FILL_MASK, request, context)

    async def Score(self, request: scoring_pb2.ScoreRequest, context: Context) -> Message:
        """Return how well each text fits."""
        return await self._run(SCORE, request, context)

    async def _run(self, task: EncodeTask, request: Any, context: Context) -> Message:
        arrival = EncodeLoop.clock()
        try:
            model = self._catalog.resolve(request.model)
            encoder = model.encoder(task.name)
            finish = task.check(request, encoder.manifest, self._max_prompt_bytes)
            urgency = read_urgency(request, arrival, context)
            reading = Reading(manifest=encoder.manifest, text=model.text, capacity=encoder.capacity)
            inputs = await self._workers.run(lambda: task.read(request, reading))
            tokenise_seconds = encoder.clock() - arrival
            call = encoder.submit([each.item for each in inputs], finish, urgency, task.field)
        except AttendantError as error:
            self._metrics.turned_away(self._catalog.label(request.model), error.reason.lower())
            raise
        try:
            await encoder.result(call)
        except asyncio.CancelledError:
            expired = ended_by(context) is grpc.StatusCode.DEADLINE_EXCEEDED
            model.metrics.failed("deadline" if expired else "cancelled")
            raise
        except DeadlineUnreachable as error:
            self._metrics.turned_away(self._catalog.label(request.model), error.reason.lower())
            raise
        except DeadlineExceeded:
            model.metrics.failed("deadline")
            raise
        except AttendantError:
            model.metrics.failed("error")
            raise
        for each in inputs:
            model.metrics.encoded(each.item.length, call.ended - arrival)
        model.metrics.completed(has_deadline=urgency.deadline is not None)
        timings = timings_of(call, tokenise_seconds)
        answer = Answer(results=call.results, reading=reading, usage=usage_of(inputs), timings=timings)
        return task.respond(request, inputs, answer)
