"""What a model's name means, and how the bundles are listed."""

import pytest

from attendant.bundle import Check, Quality
from attendant.v1 import model_service_pb2 as pb
from service.bundle import FoundBundle
from service.errors import InvalidField, ModelNotFound, ModelUnavailable
from service.rpc.catalog import Entry, ModelCatalog, State
from service.rpc.models import ModelService, describe


def refused(name: str, version: int, reason: str = "damaged") -> Entry:
    return Entry(name=name, version=version, state=State.UNAVAILABLE, reason=reason)


async def list_models(service: ModelService, size: int = 0, token: str = "") -> pb.ListModelsResponse:
    return await service.ListModels(pb.ListModelsRequest(page_size=size, page_token=token), None)


def test_a_bare_name_means_the_newest_version() -> None:
    catalog = ModelCatalog([refused("a", 2), refused("a", 10), refused("b", 1)])
    assert catalog.find("a").key == "a/10"
    assert catalog.find("a/2").key == "a/2"


@pytest.mark.parametrize("model", ["c", "a/3", "a/", "/2", "a/2/2", "A", "a/02", " a"])
def test_an_unknown_model_is_not_found_and_the_known_ones_are_named(model: str) -> None:
    catalog = ModelCatalog([refused("a", 2)])
    with pytest.raises(ModelNotFound, match="a/2") as missing:
        catalog.resolve(model)
    assert missing.value.metadata == {"model": model}
    assert catalog.label(model) is None


def test_an_unnamed_model_is_a_bad_field() -> None:
    with pytest.raises(InvalidField, match="name a model"):
        ModelCatalog([refused("a", 2)]).find("")


def test_the_message_about_an_unknown_model_is_bounded() -> None:
    catalog = ModelCatalog(refused("x" * 60, version) for version in range(1, 500))
    with pytest.raises(ModelNotFound) as missing:
        catalog.find("y" * 10_000)
    assert len(missing.value.message) < 800


def test_a_bundle_that_is_not_served_is_unavailable_with_the_reason() -> None:
    loading = Entry(name="b", version=1, state=State.LOADING)
    catalog = ModelCatalog([refused("a", 2, "step.onnx has 3 bytes"), loading])
    with pytest.raises(ModelUnavailable, match="has 3 bytes"):
        catalog.resolve("a")
    with pytest.raises(ModelUnavailable, match="loading") as unavailable:
        catalog.resolve("b/1")
    assert unavailable.value.metadata == {"model": "b/1", "state": "loading"}
    assert catalog.label("a") == "a/2"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 1000])
async def test_pages_list_every_model_once_in_order(size: int) -> None:
    keys = [("a", 1), ("a", 2), ("a", 10), ("b", 1), ("b.1", 1), ("b-1", 3), ("c", 1)]
    service = ModelService(ModelCatalog(refused(*key) for key in reversed(keys)))
    found, token, num_pages = [], "", 0
    while token or not num_pages:
        page = await list_models(service, size, token)
        assert len(page.models) <= size
        found += [(model.name, model.version) for model in page.models]
        token, num_pages = page.next_page_token, num_pages + 1
    assert found == sorted(keys)
    assert num_pages == -(-len(keys) // size)


async def test_a_page_goes_on_where_the_last_one_ended_whatever_came_in_between() -> None:
    catalog = ModelCatalog([refused("b", 1), refused("d", 1)])
    service = ModelService(catalog)
    first = await list_models(service, 1)
    catalog.put(refused("a", 1))
    catalog.put(refused("c", 1))
    second = await list_models(service, 10, first.next_page_token)
    assert [model.name for model in second.models] == ["c", "d"]


@pytest.mark.parametrize(("size", "token"), [(-1, ""), (1001, ""), (0, "!"), (0, "YQ=="), (0, "ä"), (0, "YS94")])
async def test_bad_paging_is_refused(size: int, token: str) -> None:
    with pytest.raises(InvalidField) as error:
        await list_models(ModelService(ModelCatalog([refused("a", 1)])), size, token)
    assert error.value.field == ("page_token" if token else "page_size")


def test_a_bundle_is_described_by_its_manifest_and_certificate(bundle: FoundBundle) -> None:
    quality = Quality(
        perplexity=11,
        reference_perplexity=10,
        relative_increase=0.01,
        standard_error=0.001,
        num_tokens=100,
        text="a book",
        bound=0.015,
    )
    certificate = bundle.manifest.certificate.model_copy(update={"quality": quality})
    manifest = bundle.manifest.model_copy(update={"certificate": certificate})
    found = FoundBundle(bundle.directory, manifest, bundle.sha256)
    entry = Entry(name="tiny-fp32", version=1, state=State.LOADING, found=found)
    model = describe(entry)
    assert (model.name, model.version, model.state) == ("tiny-fp32", 1, pb.MODEL_STATE_LOADING)
    assert (model.precision, model.max_model_len) == ("fp32", manifest.limits.max_model_len)
    assert model.has_chat_template
    assert model.bundle_sha256 == bundle.sha256
    checks = [Check(name=c.name, measured=c.measured, bound=c.bound, grid=c.grid) for c in model.checks]
    assert tuple(checks[:-1]) == manifest.certificate.checks
    assert (checks[-1].measured, checks[-1].bound) == (0.01, 0.015)


async def test_a_refused_bundle_can_be_looked_at() -> None:
    service = ModelService(ModelCatalog([refused("a", 1, "manifest.json: schema_version")]))
    response = await service.GetModel(pb.GetModelRequest(model="a"), None)
    assert response.model.state == pb.MODEL_STATE_UNAVAILABLE
    assert response.model.reason == "manifest.json: schema_version"
