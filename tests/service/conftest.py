"""Verified bundles for the service's own tests."""

from pathlib import Path

import pytest

from service.bundle import FoundBundle, scan


@pytest.fixture(scope="session")
def tiny_bundles(tiny_repository: Path) -> dict[str, FoundBundle]:
    """The tiny bundles by precision."""
    return {found.manifest.precision: found for found in scan(tiny_repository) if isinstance(found, FoundBundle)}
