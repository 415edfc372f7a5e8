"""A bundle that is damaged, edited or wrong is refused with the reason, and the others are served."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from attendant.v1 import model_service_pb2 as pb


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def rehash(directory: Path) -> None:
    """Make the manifest's sizes and hashes true again, as somebody who means to edit a bundle would."""

    def change(manifest: dict[str, Any]) -> None:
        for file in manifest["files"]:
            content = (directory / file["name"]).read_bytes()
            file["bytes"], file["sha256"] = len(content), hashlib.sha256(content).hexdigest()

    edit_manifest(directory, change)


def largest_file(directory: Path) -> Path:
    return max((path for path in directory.iterdir() if path.suffix != ".json"), key=lambda path: path.stat().st_size)


def truncate(directory: Path) -> None:
    path = largest_file(directory)
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(directory: Path) -> None:
    path = largest_file(directory)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_the_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def change_weights(directory: Path) -> None:
    path = directory / "step.onnx"
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    largest.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(largest) * np.float32(1.02), largest.name))
    onnx.save(model, path)
    for data in directory.glob("*.data"):
        data.unlink()
    edit_manifest(directory, _inline)
    rehash(directory)


def _inline(manifest: dict[str, Any]) -> None:
    data = {graph["data"] for graph in manifest["graphs"] if graph["data"]}
    for graph in manifest["graphs"]:
        graph["data"] = None
    manifest["files"] = [file for file in manifest["files"] if file["name"] not in data]


def not_an_onnx_file(directory: Path) -> None:
    (directory / "step.onnx").write_bytes(b"not a graph")
    rehash(directory)


def cut_the_manifest(directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(path.read_text()[:500])


def add_an_unknown_field(directory: Path) -> None:
    edit_manifest(directory, lambda manifest: manifest.update(colour="red"))


def fail_the_certificate(directory: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        check = manifest["certificate"]["checks"][0]
        check["measured"] = check["bound"] * 2 + 1

    edit_manifest(directory, change)


def declare_another_dtype(directory: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        tensors = manifest["graphs"][0]["inputs"]
        next(tensor for tensor in tensors if tensor["role"] == "lengths")["dtype"] = "int64"

    edit_manifest(directory, change)


def shrink_the_vocabulary(directory: Path) -> None:
    edit_manifest(directory, lambda manifest: manifest["vocabulary"].update(size=310))


def aim_at_cuda(directory: Path) -> None:
    edit_manifest(directory, lambda manifest: manifest.update(target="cuda"))


DAMAGE = {
    "truncated": (truncate, "bytes, the manifest says"),
    "bit-flipped": (flip_a_bit, "SHA-256"),
    "without-tokenizer": (remove_the_tokenizer, "tokenizer.json is missing"),
    "reweighted": (change_weights, "golden"),
    "no-graph": (not_an_onnx_file, "step.onnx: ONNX Runtime cannot load it"),
    "cut-manifest": (cut_the_manifest, "manifest.json"),
    "unknown-field": (add_an_unknown_field, "colour"),
    "failed-check": (fail_the_certificate, "failed"),
    "other-dtype": (declare_another_dtype, "int64"),
    "small-vocabulary": (shrink_the_vocabulary, "310"),
    "for-cuda": (aim_at_cuda, "cuda"),
    "misplaced": (lambda directory: None, "holds tiny-fp32/1"),
}


@pytest.fixture(scope="module")
def damaged(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one good bundle and each kind of damage."""
    repository = tmp_path_factory.mktemp("damaged")
    original = tiny_repository / "tiny-fp32" / "1"
    shutil.copytree(original, repository / "tiny-fp32" / "1")
    for name, (damage, _) in DAMAGE.items():
        directory = repository / name / "1"
        shutil.copytree(original, directory)
        if name != "misplaced":
            edit_manifest(directory, lambda manifest, name=name: manifest.update(name=name))
        damage(directory)
    (repository / "unfinished" / "1").mkdir(parents=True)
    return repository


def test_damaged_bundles_are_refused_with_the_reason_and_the_good_one_serves(start, damaged: Path, refusal_of) -> None:
    server = start(repository=damaged).wait_ready()
    models = {model.name: model for model in server.models.ListModels(pb.ListModelsRequest()).models}
    assert set(models) == {*DAMAGE, "tiny-fp32"}, "an unfinished export is no bundle"
    for name, (_, words) in DAMAGE.items():
        assert models[name].state == pb.MODEL_STATE_UNAVAILABLE, name
        assert words in models[name].reason, (name, models[name].reason)
        assert str(damaged) not in models[name].reason.replace(str(damaged / name), ""), name
        assert server.status_of(f"model/{name}") == "NOT_SERVING"
        assert any(line.startswith(f"REFUSED {name}/1: ") for line in server.lines)
        refusal = refusal_of(lambda name=name: list(server.generate(name)))
        assert (refusal.code.name, refusal.reason) == ("UNAVAILABLE", "MODEL_UNAVAILABLE")
        assert server.value("attendant_model_ready", model=f"{name}/1") == 0
    assert models["tiny-fp32"].state == pb.MODEL_STATE_READY
    assert models["tiny-fp32"].load_seconds > 0
    assert server.value("attendant_model_ready", model="tiny-fp32/1") == 1
    assert list(server.generate("tiny-fp32"))
    assert server.status_of("readiness") == "SERVING"


def test_the_certificate_of_a_served_bundle_holds_the_checks_made_here(server) -> None:
    model = server.models.GetModel(pb.GetModelRequest(model="tiny-int8")).model
    names = [check.name for check in model.checks]
    assert "bits that differ between a row alone and among others" in names
    assert all(check.measured <= check.bound for check in model.checks)


def test_a_server_without_any_good_bundle_leaves(start, damaged: Path) -> None:
    server = start("--models", "truncated,bit-flipped", repository=damaged)
    assert server.wait() == 1
    assert "no bundle" in server.log.read_text()
    assert sum(line.startswith("REFUSED") for line in server.lines) == 2


def test_two_versions_are_served_side_by_side(start, tiny_repository: Path, tmp_path: Path) -> None:
    repository = tmp_path / "versions"
    for version, source in ((1, "tiny-fp32"), (2, "tiny-int8"), (10, "tiny-fp32")):
        directory = repository / "two" / str(version)
        shutil.copytree(tiny_repository / source / "1", directory)
        edit_manifest(directory, lambda manifest, version=version: manifest.update(name="two", version=version))
    truncate(repository / "two" / "10")
    server = start(repository=repository).wait_ready()
    for model, answers in (("two/1", "two/1"), ("two/2", "two/2"), ("two", "two/2")):
        assert next(server.generate(model)).started.model == answers
    pages = server.models.ListModels(pb.ListModelsRequest(page_size=2))
    rest = server.models.ListModels(pb.ListModelsRequest(page_token=pages.next_page_token))
    assert [model.version for model in (*pages.models, *rest.models)] == [1, 2, 10]
    assert server.status_of("model/two") == "SERVING"
    assert server.status_of("model/two/10") == "NOT_SERVING"
