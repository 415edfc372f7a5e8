"""The Dockerfile as text: pinned, linted, and about files that exist; tests/deploy/test_image.py executes it."""

import importlib.metadata
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKS = ("build.lock", "cpu.lock", "cuda.lock")
PIN = re.compile(r"(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}")


@pytest.fixture
def locked(root):
    """The pins of a lock: {name: version}."""

    def locked(name: str) -> dict[str, str]:
        lines = [line for line in (root / "deploy/docker" / name).read_text().splitlines() if not line.startswith("#")]
        pins = [PIN.fullmatch(line) for line in lines]
        assert all(pins), f"{name}: every line is a version with its hash"
        return {canonicalize_name(pin[1]): pin[2] for pin in pins}

    return locked


def closure(requirements: list[str]) -> dict[str, str]:
    """Return what is installed here of some requirements and all that they require: {name: version}."""
    found: dict[str, str] = {}
    waiting = [Requirement(each) for each in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        distribution = importlib.metadata.distribution(name)
        assert requirement.specifier.contains(distribution.version), (name, distribution.version)
        found[name] = distribution.version
        waiting += [Requirement(each) for each in distribution.requires or ()]
    return found


def test_what_the_cpu_image_installs_is_what_is_tested_here(root, locked) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert locked("cpu.lock") == closure(project["dependencies"] + project["optional-dependencies"]["cpu"])


def test_what_builds_the_package_is_pinned(root, locked) -> None:
    requires = tomllib.loads((root / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {canonicalize_name(Requirement(each).name) for each in requires} <= locked("build.lock").keys()


def test_the_cuda_image_differs_in_the_runtime_alone(root, locked) -> None:
    cpu, cuda = locked("cpu.lock"), locked("cuda.lock")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    gpu = {canonicalize_name(Requirement(each).name) for each in project["optional-dependencies"]["gpu"]}
    added = {name for name in cuda.keys() - cpu.keys() if not name.startswith("nvidia-")}
    assert added == {name for name in gpu if not name.startswith("nvidia-")}
    assert cpu.keys() - cuda.keys() == {"onnxruntime"}, "both wheels would be the same directory"
    assert cuda["onnxruntime-gpu"] == cpu["onnxruntime"]
    assert {name: cuda[name] for name in cpu.keys() & cuda.keys()} == {
        name: cpu[name] for name in cpu.keys() & cuda.keys()
    }


@pytest.mark.parametrize("name", LOCKS)
def test_every_version_that_is_tested_is_the_one_that_is_locked(root, locked, name: str) -> None:
    tested = dict(line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if "==" in line)
    tested = {canonicalize_name(each): version for each, version in tested.items()}
    pins = locked(name)
    assert {each: pins[each] for each in pins.keys() & tested.keys()} == {
        each: tested[each] for each in pins.keys() & tested.keys()
    }
    assert not {"torch", "onnx", "transformers", "safetensors"} & pins.keys()


@pytest.mark.slow
def test_the_versions_of_the_cuda_image_fit_together_and_can_be_had(root) -> None:
    platforms = runpy.run_path(str(root / "deploy/docker/lock.py"))["PLATFORMS"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--target", "nowhere"]
    command += ["--require-hashes", "--only-binary", ":all:", "--python-version", "3.11"]
    command += [argument for platform in platforms for argument in ("--platform", platform)]
    command += ["--requirement", str(root / "deploy/docker/cuda.lock")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime-gpu-" in done.stdout


@pytest.mark.parametrize("name", ["Dockerfile", "bundles.Dockerfile"])
def test_the_linter_has_nothing_to_say(root, name: str) -> None:
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([program, root / "deploy/docker" / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_file_that_is_copied_exists_and_is_sent_to_the_builder(root, dockerfile) -> None:
    sent = [
        line.removeprefix("!")
        for line in (root / "deploy/docker/Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    copied = [
        word for each in dockerfile if each.word == "COPY" for word in each.words[:-1] if "--from" not in each.value
    ]
    assert copied
    for source in copied:
        assert (root / source).exists(), source
        assert any(Path(source).match(pattern) for pattern in sent), f"{source} is ignored"
    for pattern in sent:
        assert list(root.glob(pattern)), f"{pattern}: there is no such file"


def test_both_images_run_as_a_number_that_is_not_root_and_say_what_they_are(root, dockerfile) -> None:
    serving = [each for each in dockerfile if each.stage == "serving"]
    (user,) = [each.value for each in serving if each.word == "USER"]
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    assert not [each for each in dockerfile if each.word == "USER" and each.stage != "serving"]
    bases = {each.value.split()[0] for each in dockerfile if each.word == "FROM" and each.stage in ("cpu", "cuda")}
    assert bases == {"serving"}
    (label,) = [each for each in serving if each.word == "LABEL"]
    labels = dict(word.split("=", 1) for word in label.words)
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    assert labels["org.opencontainers.image.version"] == version
    assert {"title", "description", "licenses", "revision"} <= {name.rpartition(".")[2] for name in labels}
    assert {each.word for each in serving} >= {"ENTRYPOINT", "HEALTHCHECK", "STOPSIGNAL", "EXPOSE", "WORKDIR"}


def test_the_base_is_one_exact_version_for_all_stages(dockerfile) -> None:
    stages = {each.stage for each in dockerfile if each.word == "FROM"}
    bases = {each.value.split()[0] for each in dockerfile if each.word == "FROM"} - stages
    (base,) = bases
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base)
