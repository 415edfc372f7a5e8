"""What a bundle showed at its first load on a device is kept, counts there alone, and no file can do harm."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from attendant.bundle import Check
from service.app.device_certificate import CertificateStore
from service.bundle import FoundBundle
from service.engine.device_identity import DeviceIdentity

DEVICE = DeviceIdentity(
    name="NVIDIA H200",
    provider="CUDAExecutionProvider",
    onnxruntime="1.31.1",
    compute_capability="9.0",
    driver="580.95",
)
CHECKS = (
    Check(name="golden replay", measured=0.004, bound=0.02, grid="prompt of 96 tokens"),
    Check(name="difference between a row alone and among others", measured=0.0, bound=0.02, grid="5 rows"),
)


@pytest.fixture
def bundle(tiny_bundles: dict[str, FoundBundle]) -> FoundBundle:
    return tiny_bundles["fp32"]


def test_a_first_load_is_certified_and_a_later_one_shows_it(
    tmp_path: Path, bundle: FoundBundle, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "made" / "on demand"
    with caplog.at_level(logging.INFO):
        first = CertificateStore(directory, DEVICE).certify(bundle, CHECKS)
        again = CertificateStore(directory, DEVICE).certify(bundle, CHECKS[:1])
    assert again == first, "what counts is what was measured first"
    assert (first.device, first.checks) == (DEVICE, CHECKS)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "tiny-fp32/1 is certified on NVIDIA H200: 2 checks passed",
        f"tiny-fp32/1 was certified on NVIDIA H200 at {first.certified_at.isoformat()}",
    ]


def test_a_certificate_says_all_that_was_measured_and_on_what(tmp_path: Path, bundle: FoundBundle) -> None:
    store = CertificateStore(tmp_path, DEVICE)
    certificate = store.certify(bundle, CHECKS)
    assert json.loads(store.path(bundle).read_text()) == {
        "of": {
            "sha256": bundle.sha256,
            "device": {
                "name": "NVIDIA H200",
                "provider": "CUDAExecutionProvider",
                "onnxruntime": "1.31.1",
                "compute_capability": "9.0",
                "driver": "580.95",
            },
        },
        "model": "tiny-fp32/1",
        "certified_at": certificate.certified_at.isoformat(),
        "checks": [check.model_dump() for check in CHECKS],
    }
    assert list(tmp_path.iterdir()) == [store.path(bundle)]


@pytest.mark.parametrize(
    "change", [{"name": "NVIDIA L4"}, {"driver": "590.1"}, {"onnxruntime": "1.32.0"}, {"compute_capability": "8.9"}]
)
def test_another_device_driver_or_runtime_is_certified_for_itself(
    change: dict[str, str], tmp_path: Path, bundle: FoundBundle, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = CertificateStore(tmp_path, DEVICE), CertificateStore(tmp_path, replace(DEVICE, **change))
    old.certify(bundle, CHECKS)
    with caplog.at_level(logging.INFO):
        certificate = new.certify(bundle, CHECKS[:1])
    assert certificate.checks == CHECKS[:1]
    assert old.path(bundle).name in caplog.text and "do not count on" in caplog.text
    new.path(bundle).write_bytes(old.path(bundle).read_bytes())
    assert new.certify(bundle, CHECKS[:1]).checks == CHECKS[:1]
    assert "is certified anew" in caplog.text, "a certificate that was carried over"


def test_other_bundles_have_certificates_of_their_own(tmp_path: Path, tiny_bundles: dict[str, FoundBundle]) -> None:
    store = CertificateStore(tmp_path, DEVICE)
    store.certify(tiny_bundles["fp32"], CHECKS)
    assert store.certify(tiny_bundles["int8"], CHECKS[:1]).checks == CHECKS[:1]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"of": {}, "checks": []}', b"[" * 100_000, b'{"of": null}'],
    ids=["empty", "cut", "binary", "list", "object", "foreign", "deep", "odd"],
)
def test_a_damaged_file_is_told_left_aside_and_written_anew(
    content: bytes, tmp_path: Path, bundle: FoundBundle, caplog: pytest.LogCaptureFixture
) -> None:
    store = CertificateStore(tmp_path, DEVICE)
    store.path(bundle).write_bytes(content)
    certificate = store.certify(bundle, CHECKS)
    assert certificate.checks == CHECKS
    assert f"is certified anew: {store.path(bundle)}" in caplog.text
    caplog.clear()
    assert store.certify(bundle, CHECKS) == certificate
    assert not caplog.records


def test_a_certificate_with_a_check_that_failed_or_without_any_does_not_count(
    tmp_path: Path, bundle: FoundBundle, caplog: pytest.LogCaptureFixture
) -> None:
    store = CertificateStore(tmp_path, DEVICE)
    store.certify(bundle, CHECKS)
    kept = json.loads(store.path(bundle).read_text())
    failed = kept | {"checks": [kept["checks"][0] | {"measured": 0.5}]}
    for forged in (failed, kept | {"checks": []}, kept | {"certified_at": "soon"}, kept | {"checks": [{"name": 3}]}):
        store.path(bundle).write_text(json.dumps(forged))
        assert store.certify(bundle, CHECKS).checks == CHECKS
    assert caplog.text.count("is certified anew") == 4


def test_every_flipped_byte_is_survived(tmp_path: Path, bundle: FoundBundle) -> None:
    store = CertificateStore(tmp_path, DEVICE)
    store.certify(bundle, CHECKS)
    whole = store.path(bundle).read_bytes()
    for place in range(0, len(whole), 3):
        store.path(bundle).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert all(check.passed for check in store.certify(bundle, CHECKS).checks)


def test_a_directory_that_cannot_be_written_is_only_told(
    tmp_path: Path, bundle: FoundBundle, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert CertificateStore(tmp_path / "file", DEVICE).certify(bundle, CHECKS).checks == CHECKS
    assert "is not kept" in caplog.text
