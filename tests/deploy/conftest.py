"""What deploy/ says, read as Docker and Kubernetes would read it."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
Object = dict[str, Any]


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
def render(tmp_path_factory) -> Callable[..., list[Object]]:
    """Render an overlay into its objects; a component that it has as a comment may be taken in."""
    rendered: dict[tuple[str, str], list[Object]] = {}

    def render(overlay: str, component: str = "") -> list[Object]:
        if (overlay, component) not in rendered:
            tree = tmp_path_factory.mktemp("kubernetes")
            shutil.copytree(ROOT / "deploy/kubernetes", tree, dirs_exist_ok=True)
            path = tree / "overlays" / overlay / "kustomization.yaml"
            text = path.read_text("utf-8")
            if component:
                assert f"  # - ../../components/{component}" in text, f"{overlay} has no {component} to take in"
                if component.startswith("models-"):
                    text = text.replace("  - ../../components/models-", "  # - ../../components/models-")
                text = text.replace(f"  # - ../../components/{component}", f"  - ../../components/{component}")
                path.write_text(text, "utf-8")
            command = [Path(sys.executable).parent / "kubectl", "kustomize", path.parent]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            assert (done.returncode, done.stderr) == (0, ""), f"{overlay} with {component}: {done.stderr}"
            rendered[overlay, component] = list(yaml.safe_load_all(done.stdout))
        return rendered[overlay, component]

    return render


@pytest.fixture
def stopped() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the test."""
    running: list[subprocess.Popen[str]] = []
    yield running
    for process in running:
        process.kill()
        process.communicate()
