"""What the machine is, as JSON: device, driver, versions. Nothing here needs a GPU to be there."""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "onnxruntime-gpu",
    "onnxruntime",
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "numpy",
    "grpcio",
    "protobuf",
    "pydantic",
)


def describe() -> dict[str, str]:
    """Return name and value of all that figures depend on."""
    told = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "commit": _commit(),
        **_device(),
    }
    for package in PACKAGES:
        try:
            told[package] = version(package)
        except PackageNotFoundError:
            told[package] = "not installed"
    return told


def _device() -> dict[str, str]:
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return {
            "device": str(pynvml.nvmlDeviceGetName(handle)),
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "CUDA of the driver": str(pynvml.nvmlSystemGetCudaDriverVersion_v2()),
            "device memory": f"{memory.total / 2**30:.1f} GiB, {memory.free / 2**30:.1f} GiB free",
        }
    except pynvml.NVMLError as error:
        return {"device": f"none: {error}"}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str:
    root = Path(__file__).parents[2]
    try:
        told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return told.stdout.strip() or "unknown"


if __name__ == "__main__":
    print(json.dumps(describe()))
