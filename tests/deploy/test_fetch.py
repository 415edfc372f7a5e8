"""The init container's script, against a real HTTP server: bundles arrive whole and checked, or not at all."""

import hashlib
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing is written about requests."""


@pytest.fixture
def archive(tmp_path: Path, tiny_repository: Path) -> Iterator[tuple[str, str]]:
    """Where an archive of bundles is served, and its SHA-256."""
    served = tmp_path / "served"
    served.mkdir()
    with tarfile.open(served / "bundles.tar.gz", "w:gz") as tar:
        tar.add(tiny_repository, ".")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=served)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        digest = hashlib.sha256((served / "bundles.tar.gz").read_bytes()).hexdigest()
        yield f"http://127.0.0.1:{server.server_port}/bundles.tar.gz", digest
        server.shutdown()
        thread.join()


@pytest.fixture
def fetch(root: Path, tmp_path: Path):
    models = tmp_path / "models"
    models.mkdir()

    def fetch(url: str, digest: str) -> tuple[int, str, Path]:
        command = [sys.executable, root / "deploy/kubernetes/components/models-init/fetch.py", models]
        environment = os.environ | {"BUNDLES_URL": url, "BUNDLES_SHA256": digest}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
        return done.returncode, done.stderr, models

    return fetch


def files(directory: Path) -> dict[Path, bytes]:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_bundles_arrive_as_they_were_packed_even_after_a_try_that_broke_off(
    archive, fetch, tiny_repository
) -> None:
    _, _, models = fetch("http://127.0.0.1:9/nobody", archive[1])
    (models / "tiny-fp32").mkdir()
    (models / "tiny-fp32" / "left").write_text("by an earlier try")
    status, error, models = fetch(*archive)
    assert (status, error) == (0, "")
    assert files(models) == files(tiny_repository)


def test_an_archive_that_is_not_the_one_that_is_wanted_is_refused(archive, fetch) -> None:
    status, error, models = fetch(archive[0], "0" * 64)
    assert status == 1
    assert archive[1] in error
    assert not list(models.iterdir())
