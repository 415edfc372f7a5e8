"""Finding bundles in a repository and checking that their files are the ones the manifest lists.

A repository is `<repository>/<name>/<version>/manifest.json`. What is broken is reported, never raised past a scan, so
that one damaged bundle does not keep the others from being served. Hashes detect damage and careless edits; they do not
prove who made a bundle.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from attendant.bundle import MANIFEST_NAME, BundleError, Manifest, file_sha256, read_manifest

_MAX_VERSION = 2**31 - 1  # what the API's int32 holds


class BundleRefused(Exception):
    """A bundle is not served; the message says which check failed and, for a number, by how much."""


@dataclass(frozen=True, slots=True)
class FoundBundle:
    """A bundle whose manifest reads well; `sha256` is the manifest's own hash, the identity of the bundle."""

    directory: Path
    manifest: Manifest
    sha256: str


@dataclass(frozen=True, slots=True)
class RefusedBundle:
    """A bundle that cannot be served, by the names of its directories."""

    name: str
    version: int
    reason: str


def scan(repository: Path) -> list[FoundBundle | RefusedBundle]:
    """List every version directory of a repository, by name, then version.

    A directory without a manifest is an export that has not finished and is passed over, as is one whose name is no
    version: a decimal number from 1 to 2147483647 without leading zeros.

    Raises:
        NotADirectoryError: there is no such directory.
    """
    if not repository.is_dir():
        raise NotADirectoryError(f"repository {repository} is not a directory")
    found: list[FoundBundle | RefusedBundle] = []
    for model in sorted(path for path in repository.iterdir() if path.is_dir()):
        versions = [path for path in model.iterdir() if _is_version(path.name) and (path / MANIFEST_NAME).is_file()]
        found += [_open(directory) for directory in sorted(versions, key=lambda path: int(path.name))]
    return found


def _is_version(name: str) -> bool:
    return re.fullmatch("[1-9][0-9]{0,9}", name) is not None and int(name) <= _MAX_VERSION


def _open(directory: Path) -> FoundBundle | RefusedBundle:
    name, version = directory.parent.name, int(directory.name)
    try:
        manifest, sha256 = read_manifest(directory)
    except BundleError as error:
        return RefusedBundle(name, version, str(error))
    if (manifest.name, manifest.version) != (name, version):
        return RefusedBundle(name, version, f"{directory} holds {manifest.key}: a bundle lies in <name>/<version>")
    return FoundBundle(directory, manifest, sha256)


def verify_files(found: FoundBundle) -> None:
    """Compare size and SHA-256 of every file with the manifest.

    Raises:
        BundleRefused: a file is missing, truncated or changed.
    """
    for listed in found.manifest.files:
        path = found.directory / listed.name
        if not path.is_file():
            raise BundleRefused(f"{listed.name} is missing")
        size = path.stat().st_size
        if size != listed.bytes:
            raise BundleRefused(f"{listed.name} has {size} bytes, the manifest says {listed.bytes}")
        if (sha256 := file_sha256(path)) != listed.sha256:
            raise BundleRefused(
                f"{listed.name} has SHA-256 {sha256[:12]}..., the manifest says {listed.sha256[:12]}..."
            )
