"""What bundles showed at their first load on a device, kept in `--state-dir`: a file for each bundle and device.

A bundle's own certificate says what held where it was exported; this one, what was measured where it is served. It
changes nothing of a load: all that is checked is checked each time. So no fault of a file or a disk is more than a line
in the log.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from attendant.bundle import Check
from service.bundle import FoundBundle
from service.engine.device_identity import DeviceIdentity
from service.rpc.catalog import DeviceCertificate

logger = logging.getLogger(__name__)

_CHECKS = TypeAdapter(tuple[Check, ...])


class CertificateStore:
    """The certificates in one directory that count on one device.

    Args:
        directory: where they are; it is made when the first is written.
        device: what this process computes on.
    """

    def __init__(self, directory: Path, device: DeviceIdentity) -> None:
        self._directory = directory
        self._device = device

    def certify(self, bundle: FoundBundle, checks: Sequence[Check]) -> DeviceCertificate:
        """Return the certificate of a bundle that has just passed its checks: the one that is kept, or a new one."""
        key, device = bundle.manifest.key, self._device.name
        kept = self._read(bundle)
        if kept is not None:
            logger.info("%s was certified on %s at %s", key, device, kept.certified_at.isoformat())
            return kept
        if others := self._of_other_devices(bundle):
            logger.info("certificates of %s from other devices do not count on %s: %s", key, device, ", ".join(others))
        now = datetime.now(UTC).replace(microsecond=0)
        certificate = DeviceCertificate(device=self._device, certified_at=now, checks=tuple(checks))
        try:
            self._write(bundle, certificate)
            logger.info("%s is certified on %s: %d checks passed", key, device, len(certificate.checks))
        except OSError as error:
            logger.warning("the certificate of %s on %s is not kept: %s", key, device, error)
        return certificate

    def path(self, bundle: FoundBundle) -> Path:
        """Return the file of a bundle on this device."""
        device = hashlib.sha256(json.dumps(self._device.to_dict(), sort_keys=True).encode()).hexdigest()
        return self._directory / f"{_prefix(bundle)}{device[:16]}.json"

    def _read(self, bundle: FoundBundle) -> DeviceCertificate | None:
        path = self.path(bundle)
        try:
            kept = json.loads(path.read_text("utf-8"))
            if not isinstance(kept, dict) or kept.get("of") != self._key(bundle):
                raise ValueError("it is not of this bundle and device")
            checks = _CHECKS.validate_json(json.dumps(kept.get("checks")))
            if not checks or not all(check.passed for check in checks):
                raise ValueError("it holds a check that has not passed, or none")
            certified_at = datetime.fromisoformat(str(kept.get("certified_at")))
        except FileNotFoundError:
            return None
        except ValidationError:
            problem = "its checks cannot be read"
        except (OSError, ValueError, RecursionError) as error:
            problem = str(error)
        else:
            return DeviceCertificate(device=self._device, certified_at=certified_at, checks=checks)
        logger.warning("%s is certified anew: %s: %s", bundle.manifest.key, path, problem)
        return None

    def _of_other_devices(self, bundle: FoundBundle) -> list[str]:
        return sorted(
            path.name for path in self._directory.glob(f"{_prefix(bundle)}*.json") if path != self.path(bundle)
        )

    def _write(self, bundle: FoundBundle, certificate: DeviceCertificate) -> None:
        path = self.path(bundle)
        self._directory.mkdir(parents=True, exist_ok=True)
        kept = {
            "of": self._key(bundle),
            "model": bundle.manifest.key,
            "certified_at": certificate.certified_at.isoformat(),
            "checks": [check.model_dump() for check in certificate.checks],
        }
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(kept, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def _key(self, bundle: FoundBundle) -> dict[str, Any]:
        return {"sha256": bundle.sha256, "device": self._device.to_dict()}


def _prefix(bundle: FoundBundle) -> str:
    return f"certificate-{bundle.sha256[:16]}-"
