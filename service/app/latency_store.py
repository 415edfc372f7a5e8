"""What latency models learned, kept across restarts: a file for each bundle on each kind of machine.

A file is taken only where it would have been written: by the same bundle, threads, ONNX Runtime, processor and CUDA
device. Without it a model learns anew, so no fault of a file or a disk is more than a line in the log.
"""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime

from attendant.processor import processor_features
from service.bundle import FoundBundle
from service.engine.device_identity import DeviceIdentity
from service.scheduling.latency import LatencyModel

logger = logging.getLogger(__name__)


class LatencyStore:
    """The files of one directory.

    Args:
        directory: where they are; it is made when the first is written.
        threads: of ONNX Runtime, on which every cost depends.
        device: that computes, where it is not the processor.
    """

    def __init__(self, directory: Path, threads: int, device: DeviceIdentity | None = None) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._saved: dict[Path, Mapping[str, object]] = {}
        self._machine: dict[str, Any] = {
            "threads": threads,
            "onnxruntime": onnxruntime.__version__,
            "processor": list(processor_features()),
        }
        if device is not None:
            self._machine["device"] = device.to_dict()

    def restore(self, bundle: FoundBundle, latency: LatencyModel) -> None:
        """Let a model begin with what was kept of its bundle, if anything fit to use was."""
        path = self.path(bundle)
        try:
            kept = json.loads(path.read_text("utf-8"))
            if (
                not isinstance(kept, dict)
                or kept.get("of") != self._key(bundle)
                or not isinstance(kept.get("learned"), dict)
            ):
                raise ValueError("it is not of this bundle and machine")
            latency.restore(kept["learned"])
        except FileNotFoundError:
            logger.debug("nothing is known of how long %s takes", bundle.manifest.key)
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s learns anew how long it takes: %s: %s", bundle.manifest.key, path, error)

    def save(self, bundle: FoundBundle, learned: Mapping[str, object]) -> None:
        """Keep what `LatencyModel.to_dict` returned; whatever happens meanwhile, the file is the old one or the new."""
        path = self.path(bundle)
        with self._lock:
            if not learned or learned == self._saved.get(path):
                return
            try:
                self._write(path, {"of": self._key(bundle), "model": bundle.manifest.key, "learned": learned})
                self._saved[path] = learned
            except OSError as error:
                logger.warning("what %s learned of its latency is not kept: %s", bundle.manifest.key, error)

    def _write(self, path: Path, kept: Mapping[str, object]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(kept, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def path(self, bundle: FoundBundle) -> Path:
        """Return the file of a bundle on this machine."""
        digest = hashlib.sha256(json.dumps(self._key(bundle), sort_keys=True).encode()).hexdigest()
        return self._directory / f"latency-{digest[:16]}.json"

    def _key(self, bundle: FoundBundle) -> dict[str, Any]:
        return {"sha256": bundle.sha256, **self._machine}
