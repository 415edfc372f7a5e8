"""What latency models learned survives a restart, and no file or disk can do more harm than to be missing."""

import logging
from pathlib import Path

import pytest

from service.app.latency_store import LatencyStore
from service.bundle import FoundBundle
from service.engine.device_identity import DeviceIdentity
from service.scheduling.latency import LatencyModel
from service.scheduling.work import decode_work


@pytest.fixture
def bundle(tiny_bundles: dict[str, FoundBundle]) -> FoundBundle:
    return tiny_bundles["fp32"]


def taught() -> LatencyModel:
    latency = LatencyModel()
    for rows in range(1, 21):
        latency.observe("decode", decode_work([30] * rows), 0.01 + 0.001 * rows)
    return latency


def restored(store: LatencyStore, bundle: FoundBundle) -> LatencyModel:
    latency = LatencyModel()
    store.restore(bundle, latency)
    return latency


def test_a_restart_begins_with_what_was_learned(tmp_path: Path, bundle: FoundBundle) -> None:
    latency = taught()
    LatencyStore(tmp_path / "made" / "on demand", 2).save(bundle, latency.to_dict())
    again = restored(LatencyStore(tmp_path / "made" / "on demand", 2), bundle)
    assert again.to_dict() == latency.to_dict()
    assert again.predict("decode", decode_work([30] * 8)) == pytest.approx(0.018, rel=0.01)
    assert [path.suffix for path in (tmp_path / "made" / "on demand").iterdir()] == [".json"]


def test_other_threads_devices_and_bundles_begin_anew(tmp_path: Path, tiny_bundles: dict[str, FoundBundle]) -> None:
    LatencyStore(tmp_path, 2).save(tiny_bundles["fp32"], taught().to_dict())
    device = DeviceIdentity(name="NVIDIA H200", provider="CUDAExecutionProvider", onnxruntime="1.31.1")
    assert restored(LatencyStore(tmp_path, 2, device), tiny_bundles["fp32"]).observations("decode") == 0
    assert restored(LatencyStore(tmp_path, 4), tiny_bundles["fp32"]).observations("decode") == 0
    assert restored(LatencyStore(tmp_path, 2), tiny_bundles["int8"]).observations("decode") == 0


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"of": {}, "learned": {}}', b"[" * 100_000, b'{"of": null, "learned": 3}'],
    ids=["empty", "cut", "binary", "list", "object", "foreign", "deep", "odd"],
)
def test_a_damaged_file_is_told_and_left_aside(
    content: bytes, tmp_path: Path, bundle: FoundBundle, caplog: pytest.LogCaptureFixture
) -> None:
    store = LatencyStore(tmp_path, 2)
    store.path(bundle).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert restored(store, bundle).observations("decode") == 0
    assert [record.getMessage() for record in caplog.records if str(store.path(bundle)) in record.getMessage()]


def test_every_flipped_byte_is_survived(tmp_path: Path, bundle: FoundBundle) -> None:
    store = LatencyStore(tmp_path, 2)
    store.save(bundle, taught().to_dict())
    whole = store.path(bundle).read_bytes()
    for place in range(len(whole)):
        store.path(bundle).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        seconds = restored(store, bundle).predict("decode", decode_work([30]))
        assert seconds is None or 0 <= seconds < float("inf")


def test_a_missing_file_is_no_news(tmp_path: Path, bundle: FoundBundle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert restored(LatencyStore(tmp_path / "nowhere", 2), bundle).observations("decode") == 0
    assert not caplog.records


def test_a_directory_that_cannot_be_written_is_only_told(
    tmp_path: Path, bundle: FoundBundle, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    LatencyStore(tmp_path / "file", 2).save(bundle, taught().to_dict())
    assert "is not kept" in caplog.text


def test_nothing_is_written_while_nothing_was_learned(tmp_path: Path, bundle: FoundBundle) -> None:
    store = LatencyStore(tmp_path, 2)
    store.save(bundle, LatencyModel().to_dict())
    assert not list(tmp_path.iterdir())
    latency = taught()
    store.save(bundle, latency.to_dict())
    store.path(bundle).unlink()
    store.save(bundle, latency.to_dict())
    assert not list(tmp_path.iterdir()), "it was written already"
    latency.observe("decode", decode_work([1]), 0.1)
    store.save(bundle, latency.to_dict())
    assert store.path(bundle).exists()
