"""`ModelService`: the bundles of the repository, the refused ones with the reason."""

import base64
import binascii

from attendant.bundle import Check
from attendant.v1 import model_service_pb2 as pb
from service.errors import InvalidField
from service.rpc.catalog import Entry, ModelCatalog, State
from service.rpc.registration import Context

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

_WIRE_STATE = {
    State.LOADING: pb.MODEL_STATE_LOADING,
    State.READY: pb.MODEL_STATE_READY,
    State.UNAVAILABLE: pb.MODEL_STATE_UNAVAILABLE,
}


class ModelService:
    """Describes what the catalog holds."""

    def __init__(self, catalog: ModelCatalog) -> None:
        self._catalog = catalog

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Return a page; pages follow each other by name and version, whatever is added in between."""
        if not 0 <= request.page_size <= MAX_PAGE_SIZE:
            raise InvalidField("page_size", request.page_size, f"must be in [0, {MAX_PAGE_SIZE}]")
        after = _read_page_token(request.page_token)
        size = request.page_size or DEFAULT_PAGE_SIZE
        entries = [entry for entry in self._catalog.entries if after is None or (entry.name, entry.version) > after]
        page = entries[:size]
        return pb.ListModelsResponse(
            models=[describe(entry) for entry in page],
            next_page_token=_page_token(page[-1]) if len(entries) > size else "",
        )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Return one model, served or not."""
        return pb.GetModelResponse(model=describe(self._catalog.find(request.model)))


def describe(entry: Entry) -> pb.Model:
    """Return what the API says of a bundle."""
    model = pb.Model(name=entry.name, version=entry.version, state=_WIRE_STATE[entry.state], reason=entry.reason)
    if entry.found is None:
        return model
    manifest = entry.found.manifest
    checks = list(manifest.certificate.checks)
    if (quality := manifest.certificate.quality) is not None:
        grid = f"{quality.num_tokens} tokens of {quality.text}, standard error {quality.standard_error:.2g}"
        checks.append(
            Check(
                name="perplexity above fp32, as a share",
                measured=quality.relative_increase,
                bound=quality.bound,
                grid=grid,
            )
        )
    model.family = manifest.family
    model.tasks.extend(manifest.tasks)
    model.precision = manifest.precision
    model.max_model_len = manifest.limits.max_model_len
    model.bundle_sha256 = entry.found.sha256
    model.source = manifest.provenance.source
    model.licence = manifest.provenance.licence
    model.max_source_len = manifest.limits.max_source_len or 0
    model.reads = "text"
    if (image := manifest.image) is not None:
        model.reads = "image"
        model.image_shape.extend((image.channels, image.height, image.width))
    if manifest.classes is not None:
        model.labels.extend(manifest.classes.labels)
    if manifest.vocabulary is not None:
        model.vocab_size = manifest.vocabulary.size
        model.has_chat_template = manifest.vocabulary.chat_template is not None
    if entry.served is not None:
        model.load_seconds = entry.served.load_seconds
        checks += entry.served.loop.checks
        if (certificate := entry.served.certificate) is not None:
            model.certified_on = certificate.device.name
            model.certified_at.FromDatetime(certificate.certified_at)
    model.checks.extend(
        pb.Check(name=check.name, measured=check.measured, bound=check.bound, grid=check.grid) for check in checks
    )
    return model


def _page_token(entry: Entry) -> str:
    return base64.urlsafe_b64encode(entry.key.encode()).decode()


def _read_page_token(token: str) -> tuple[str, int] | None:
    if not token:
        return None
    try:
        name, _, version = base64.urlsafe_b64decode(token.encode("ascii")).decode().rpartition("/")
        return name, int(version)
    except (binascii.Error, ValueError) as error:
        raise InvalidField("page_token", token, "must be the next_page_token of an earlier page") from error
