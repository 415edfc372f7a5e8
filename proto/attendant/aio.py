"""The asyncio client: `async with AsyncClient("localhost:8001") as client: ...`, otherwise as `attendant.client`.

    async for text in client.generate("Once upon a time", model="smollm2-135m"):
        print(text, end="", flush=True)

Cancelling the task that reads a stream cancels the answer on the server.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from attendant import _encoding, _messages
from attendant._encoding import ClassifyOptions, EmbedOptions, EncodeOptions, FillMaskOptions, Texts
from attendant._encoding_types import Classifiable, Classifications, FilledTexts, Ranking, Taggings
from attendant._errors import Cancelled, from_rpc_error
from attendant._explaining import ExplainOptions, ExplanationParts, explain_request
from attendant._messages import GenerateOptions
from attendant._types import (
    Delta,
    Embeddings,
    Event,
    Explanation,
    Finished,
    Generation,
    Model,
    Started,
    Tokens,
    Turn,
)
from attendant.client import PAGE_SIZE, READINESS, channel_options
from attendant.v1 import model_service_pb2
from attendant.v1.inference_service_pb2_grpc import InferenceServiceStub
from attendant.v1.model_service_pb2_grpc import ModelServiceStub


class AsyncGenerateStream:
    """One answer as it comes: iterate for its text, `events()` for everything, `result()` for the whole.

    They share what has been read: after a loop over the text, `result()` is at hand. Leaving an iteration early,
    `cancel()`, and the end of an `async with` block cancel an unfinished answer.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._answer = _messages.Answer()
        self._is_cancelled = False

    @property
    def started(self) -> Started | None:
        """What the server said on accepting the request, once it has."""
        return self._answer.started

    @property
    def finished(self) -> Finished | None:
        """Why and how the answer ended, once it has."""
        return self._answer.finished

    @property
    def text(self) -> str:
        """The text so far."""
        return self._answer.text

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield the remaining events.

        Raises:
            AttendantError: the call failed.
        """
        try:
            async for response in self._call:
                event = self._answer.add(response)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        except asyncio.CancelledError:
            if self._is_cancelled:  # the call, by cancel(); otherwise the task that reads it
                raise Cancelled("cancelled by the caller", code=grpc.StatusCode.CANCELLED) from None
            raise
        finally:
            self._call.cancel()  # nothing, if the call has ended
        self._answer.check_finished()

    async def __aiter__(self) -> AsyncIterator[str]:
        """Yield the remaining text, in pieces that are never empty."""
        async with aclosing(self.events()) as events:
            async for event in events:
                if isinstance(event, Delta) and event.text and event.index == 0:
                    yield event.text

    async def result(self) -> Generation:
        """Read to the end and return the whole answer, what was read before included."""
        async for _ in self.events():
            pass
        return self._answer.whole()

    def cancel(self) -> None:
        """Stop generating, on the server too."""
        self._is_cancelled = True
        self._call.cancel()

    async def __aenter__(self) -> "AsyncGenerateStream":
        """Return the stream."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel what is not finished."""
        self.cancel()


class AsyncClient:
    """A connection to a server, or to all servers behind one name. Belongs to one event loop.

    Args:
        target: "host:port", or any other gRPC target ("dns:///attendant-headless:8001").
        credentials: for TLS; plain text without.
        check_health: "readiness", or "model/" and a model's name: of the servers behind the name only those get calls
            whose health says that they serve it, so that one that drains is left before it goes. Not through a proxy:
            it chooses the server itself.
        tenant: who asks; a server that has too much to do shares its time fairly among tenants.
        options: further gRPC channel options.

    Every method takes `timeout` in seconds and raises an AttendantError if the call fails.
    """

    def __init__(
        self,
        target: str = "localhost:8001",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        check_health: str | None = None,
        tenant: str = "",
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        options = (*channel_options(check_health), *options)
        self._metadata = (("x-attendant-tenant", tenant),) if tenant else ()
        self._channel = (
            grpc.aio.insecure_channel(target, options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options)
        )
        self._inference = InferenceServiceStub(self._channel)
        self._models = ModelServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self,
        prompt: str | None = None,
        *,
        model: str,
        messages: Iterable[Turn] | None = None,
        token_ids: Iterable[int] | None = None,
        image: bytes | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerateStream:
        """Continue a prompt, a conversation or token ids, and return the stream.

        For a model that writes about a source, prompt or token ids are that source, or `image` is, a PNG or JPEG file;
        with `encoder_text` as the source, they are what the answer begins with. Exactly one is given, or
        `encoder_text` alone. Of the answers of a beam search, the stream's text is the best one's.
        """
        request = _messages.generate_request(model, prompt, messages, token_ids, image, options)
        return AsyncGenerateStream(self._inference.Generate(request, timeout=timeout, metadata=self._metadata))

    def chat(
        self,
        messages: Iterable[Turn],
        *,
        model: str,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerateStream:
        """Answer a conversation."""
        return self.generate(model=model, messages=messages, timeout=timeout, **options)

    async def embed(
        self, inputs: Texts, *, model: str, timeout: float | None = None, **options: Unpack[EmbedOptions]
    ) -> Embeddings:
        """Turn a text, or up to 256 texts or sequences of token ids, into vectors."""
        request = _encoding.embed_request(model, inputs, options)
        return _encoding.embeddings(await self._unary(self._inference.Embed, request, timeout))

    async def classify(
        self,
        inputs: Classifiable | Iterable[Classifiable],
        *,
        model: str,
        timeout: float | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> Classifications:
        """Say which classes texts, pairs of texts, token ids or images belong to, up to 256 of them."""
        request = _encoding.classify_request(model, inputs, options)
        return _encoding.classifications(await self._unary(self._inference.Classify, request, timeout))

    async def tag(
        self, inputs: Texts, *, model: str, timeout: float | None = None, **options: Unpack[EncodeOptions]
    ) -> Taggings:
        """Label every token of a text, or of up to 256 texts or sequences of token ids."""
        request = _encoding.tag_request(model, inputs, options)
        return _encoding.taggings(await self._unary(self._inference.TagTokens, request, timeout))

    async def fill_mask(
        self, inputs: Texts, *, model: str, timeout: float | None = None, **options: Unpack[FillMaskOptions]
    ) -> FilledTexts:
        """Say what might stand in the gaps of a text, or of up to 256: where the model's mask token stands."""
        request = _encoding.fill_mask_request(model, inputs, options)
        return _encoding.filled_texts(await self._unary(self._inference.FillMask, request, timeout))

    async def rerank(
        self,
        query: str,
        texts: Iterable[str],
        *,
        model: str,
        timeout: float | None = None,
        **options: Unpack[EncodeOptions],
    ) -> Ranking:
        """Say how relevant up to 256 texts are to a query, and put them in order."""
        request = _encoding.rerank_request(model, query, texts, options)
        return _encoding.ranking(await self._unary(self._inference.Score, request, timeout))

    async def explain(
        self, text: str | None = None, *, model: str, timeout: float | None = None, **options: Unpack[ExplainOptions]
    ) -> Explanation:
        """Return the attention weights of a model over a text, or what `options` name in its place.

        For a model that writes about a source, that is the source.
        """
        parts = ExplanationParts()
        request = explain_request(model, text, options)
        try:
            async for response in self._inference.Explain(request, timeout=timeout, metadata=self._metadata):
                parts.add(response)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return parts.whole()

    async def tokenize(
        self,
        text: str | None = None,
        *,
        model: str,
        messages: Iterable[Turn] | None = None,
        add_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> Tokens:
        """Turn text or a conversation into token ids, exactly as `generate` would."""
        request = _messages.tokenize_request(model, text, messages, add_special_tokens)
        return _messages.tokens(await self._unary(self._inference.Tokenize, request, timeout))

    async def detokenize(
        self,
        token_ids: Iterable[int],
        *,
        model: str,
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> str:
        """Turn token ids into text."""
        request = _messages.detokenize_request(model, token_ids, skip_special_tokens)
        response = await self._unary(self._inference.Detokenize, request, timeout)
        text: str = response.text
        return text

    async def models(self, *, timeout: float | None = None) -> list[Model]:
        """Return every bundle of the server's repository, the refused ones with the reason."""
        models: list[Model] = []
        request = model_service_pb2.ListModelsRequest(page_size=PAGE_SIZE)
        while True:
            response = await self._unary(self._models.ListModels, request, timeout)
            models += map(_messages.model, response.models)
            if not response.next_page_token:
                return models
            request.page_token = response.next_page_token

    async def model(self, name: str, *, timeout: float | None = None) -> Model:
        """Describe one model, "name" (its newest version) or "name/version"."""
        request = model_service_pb2.GetModelRequest(model=name)
        return _messages.model((await self._unary(self._models.GetModel, request, timeout)).model)

    async def is_serving(self, name: str = READINESS, *, timeout: float | None = None) -> bool:
        """Ask the server's health: of the whole, or of one model as "model/" and its name.

        Raises:
            AttendantError: no server answers, or it knows no such name.
        """
        response = await self._unary(self._health.Check, health_pb2.HealthCheckRequest(service=name), timeout)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Close the connection; unfinished calls are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> "AsyncClient":
        """Return the client."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connection."""
        await self.close()

    async def _unary(self, method: Any, request: Any, timeout: float | None) -> Any:
        try:
            return await method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
