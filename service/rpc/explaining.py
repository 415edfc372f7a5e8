"""One call of `Explain`: checked, read, run on a thread of its own, and written head by head."""

import itertools

from attendant.v1 import explain_pb2 as pb
from attendant.v1 import generation_pb2
from service.bundle import BundleRefused
from service.engine.explain_graph import ExplainGraph
from service.engine_loop import EngineLoop
from service.errors import AttendantError, ExecutionFailed
from service.metrics import ServerMetrics
from service.rpc import explain, explain_input
from service.rpc.catalog import ModelCatalog, ServedModel
from service.rpc.convert import read_options, to_request
from service.rpc.explain_input import Read, Subject, TokenIds
from service.rpc.registration import Context
from service.rpc.workers import TextWorkers


class Explaining:
    """Answers calls of `Explain`.

    Args:
        catalog: the models.
        workers: threads for text and images.
        runs: the thread that explain graphs run on, one after the other, so that they take no more than its share.
        metrics: where calls that are turned away are counted.
        max_prompt_bytes: of text in one call.
    """

    def __init__(
        self,
        catalog: ModelCatalog,
        workers: TextWorkers,
        runs: TextWorkers,
        metrics: ServerMetrics,
        max_prompt_bytes: int,
    ) -> None:
        self._catalog = catalog
        self._workers = workers
        self._runs = runs
        self._metrics = metrics
        self._max_prompt_bytes = max_prompt_bytes
        self._numbers = itertools.count(1)

    async def answer(self, request: pb.ExplainRequest, context: Context) -> None:
        """Write the Explanation, then all HeadWeights."""
        try:
            model, graph, chosen, subject = await self._accept(request, context)
        except AttendantError as error:
            self._metrics.turned_away(self._catalog.label(request.model), error.reason.lower())
            raise

        def run() -> list[pb.ExplainResponse]:
            try:
                weights = graph.run(subject.inputs)
            except BundleRefused as error:
                raise ExecutionFailed(f"the explain graph of model {model.key} is not fit to run: {error}") from error
            sends_all = not request.entropy_only
            return list(
                explain.messages(model.key, chosen, subject.labels, subject.target_ids, weights, sends_all=sends_all)
            )

        for message in await self._runs.run(run):
            await context.write(message)

    async def _accept(
        self, request: pb.ExplainRequest, context: Context
    ) -> tuple[ServedModel, ExplainGraph, list[explain.Chosen], Subject]:
        model = self._catalog.resolve(request.model)
        graph = model.explainer
        chosen = explain.choose(request, graph.told, graph.num_heads)
        explain_input.check(request, graph, model.found.manifest, self._max_prompt_bytes)
        given = await self._workers.run(lambda: explain_input.read(request, model, graph, self._max_prompt_bytes))
        target_ids: TokenIds = ()
        if explain_input.writes(graph):
            told = await self._workers.run(lambda: explain_input.read_target(request, model))
            target_ids = await self._written(model, given, context) if told is None else told
        subject = await self._workers.run(lambda: explain_input.lay_out(model, graph, given, target_ids))
        explain.check_cells(chosen, graph.told, graph.num_heads, subject.sizes, entropy_only=request.entropy_only)
        return model, graph, chosen, subject

    async def _written(self, model: ServedModel, given: Read, context: Context) -> TokenIds:
        """Return what the model itself writes about a source, always taking the most likely token."""
        engine, manifest = model.engine, model.found.manifest
        greedy = generation_pb2.SamplingParams(temperature=0.0)
        remaining = context.time_remaining()
        stream = engine.submit(
            to_request(
                read_options(generation_pb2.GenerateRequest(sampling=greedy), manifest),
                (explain_input.start_token(manifest),),
                source=given.source,
                engine_id=f"explain/{next(self._numbers)}",
                capacity=engine.capacity,
                arrival=EngineLoop.clock(),
                deadline=None if remaining is None else engine.clock() + remaining,
            )
        )
        try:
            return tuple([token.token_id async for item in stream for token in item.tokens])
        finally:
            stream.cancel()
