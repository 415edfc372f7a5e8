"""What deploy/ says, read as Docker and Kubernetes would read it."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One instruction of a Dockerfile, with the build arguments' defaults put in."""

    stage: str
    word: str
    value: str

    @property
    def words(self) -> list[str]:
        """The value as words, of a JSON list too."""
        return json.loads(self.value) if self.value.startswith("[") else shlex.split(self.value)


def instructions(path: Path) -> list[Instruction]:
    """Read a Dockerfile."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    found: list[Instruction] = []
    arguments: dict[str, str] = {}
    stage = ""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        word, _, value = line.partition(" ")
        if not word:
            continue
        value = re.sub(r"\$\{(\w+)\}", lambda match: arguments.get(match[1], match[0]), value.strip())
        if word == "ARG":
            name, _, default = value.partition("=")
            arguments[name] = default
        if word == "FROM":
            stage = value.split()[-1]
        found.append(Instruction(stage=stage, word=word, value=value))
    return found


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def dockerfile() -> list[Instruction]:
    return instructions(ROOT / "deploy/docker/Dockerfile")


@pytest.fixture(scope="session")
def kustomize() -> Callable[[str], list[dict[str, Any]]]:
    """Render a directory of deploy/kubernetes into its objects."""
    rendered: dict[str, list[dict[str, Any]]] = {}

    def kustomize(directory: str) -> list[dict[str, Any]]:
        if directory not in rendered:
            command = ["kubectl", "kustomize", str(ROOT / "deploy/kubernetes" / directory)]
            environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)
            assert done.returncode == 0, f"{directory}: {done.stderr}"
            rendered[directory] = list(yaml.safe_load_all(done.stdout))
        return rendered[directory]

    return kustomize


@pytest.fixture
def stopped() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the test."""
    running: list[subprocess.Popen[str]] = []
    yield running
    for process in running:
        process.kill()
        process.communicate()
