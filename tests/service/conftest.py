"""Verified bundles for the service's own tests."""

from pathlib import Path

import pytest

from service.bundle import FoundBundle, scan


@pytest.fixture(scope="session")
def tiny_bundles(tiny_repository: Path, encoder_repository: Path, byte_repository: Path) -> dict[str, FoundBundle]:
    """The tiny bundles by precision.

    All others are exported too before a loop fixes the thread pool of this process: no session that has threads of
    its own, as those of export do, can be made after that.
    """
    return {found.manifest.precision: found for found in scan(tiny_repository) if isinstance(found, FoundBundle)}


@pytest.fixture(scope="session")
def byte_bundles(byte_repository: Path, tiny_bundles: dict[str, FoundBundle]) -> dict[str, FoundBundle]:
    """The bundles of decoders over bytes, by the rule of what they remember."""
    return {found.manifest.name: found for found in scan(byte_repository) if isinstance(found, FoundBundle)}
