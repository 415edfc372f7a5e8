"""What the files of the repository must not say, and what they must agree on."""

import itertools
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Hosts that a file may name: this machine, licences, standards, and what stands for a user's own (a name reserved for
# examples, a Service of the cluster). Where packages come from is the installer's choice.
HOSTS = {b"localhost", b"127.0.0.1", b"www.apache.org", b"bundles.example.com", b"prometheus-operated.monitoring.svc"}
URL = re.compile(rb"(?:https?|dns)://([A-Za-z0-9.-]+)")
SOMEBODYS = re.compile(rb"(?<![\w.*])/(?:home|root|Users|opt|work)/\w+")


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, cwd=ROOT, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_foreign_host_or_a_directory_of_one_machine():
    found = {}
    for path in tracked():
        content = path.read_bytes()
        said = [*(set(URL.findall(content)) - HOSTS), *SOMEBODYS.findall(content)]
        if said:
            found[str(path.relative_to(ROOT))] = said
    assert found == {}


def test_the_top_level_holds_the_rooms_and_nothing_else():
    rooms = {path.relative_to(ROOT).parts[0] for path in tracked() if len(path.relative_to(ROOT).parts) > 1}
    assert rooms <= {".ci", "deploy", "docs", "export", "models", "proto", "service", "tests"}


def test_tests_are_no_package():
    assert [path for path in tracked() if path.name == "__init__.py" and "tests" in path.relative_to(ROOT).parts] == []


def test_the_licence_is_apache_2_0_and_pyproject_says_so():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])
    licence = (ROOT / "LICENSE").read_text()
    for said in ("Apache License", "Version 2.0, January 2004", "9. Accepting Warranty or Additional Liability"):
        assert said in licence


def test_constraints_pin_every_dependency_to_a_version_that_pyproject_allows():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert all(str(pin.specifier).startswith("==") and "+" not in str(pin.specifier) and not pin.url for pin in pins)
    extras = pyproject["project"]["optional-dependencies"]
    used = [pyproject["project"]["dependencies"], extras["cpu"], extras["export"], extras["train"]]
    for line in itertools.chain(*used, pyproject["dependency-groups"]["dev"]):
        requirement = Requirement(line)
        if requirement.name != "attendant":
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), line


def test_the_two_builds_of_onnx_runtime_are_never_installed_together():
    """Both wheels write the same directory; the one installed last silently wins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not any(line.startswith("onnxruntime") for line in project["dependencies"])
    extras = [line for extra in ("cpu", "gpu") for line in project["optional-dependencies"][extra]]
    versions = {line.partition("==")[2] for line in extras if line.startswith("onnxruntime")}
    assert len(versions) == 1
