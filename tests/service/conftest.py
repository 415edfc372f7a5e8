"""Verified bundles for the service's own tests."""

from pathlib import Path

import pytest

from service.bundle import FoundBundle, scan


@pytest.fixture(scope="session")
def tiny_bundles(tiny_repository: Path, encoder_repository: Path) -> dict[str, FoundBundle]:
    """The tiny bundles by precision.

    The encoders are exported too before a loop fixes the thread pool of this process: no session that has threads of
    its own, as those of export do, can be made after that.
    """
    return {found.manifest.precision: found for found in scan(tiny_repository) if isinstance(found, FoundBundle)}
