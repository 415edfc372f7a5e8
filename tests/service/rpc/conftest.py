"""A manifest and a codec of a real small bundle."""

import pytest

from attendant.bundle import Manifest
from service.bundle import FoundBundle
from service.text import TextCodec


@pytest.fixture(scope="session")
def bundle(tiny_bundles: dict[str, FoundBundle]) -> FoundBundle:
    return tiny_bundles["fp32"]


@pytest.fixture(scope="session")
def manifest(bundle: FoundBundle) -> Manifest:
    return bundle.manifest


@pytest.fixture(scope="session")
def codec(bundle: FoundBundle) -> TextCodec:
    assert bundle.manifest.vocabulary is not None
    return TextCodec(bundle.directory, bundle.manifest.vocabulary)
