"""The Dockerfile executed: every stage of the CPU image, instruction by instruction, in a sandbox instead of Docker.

The sandbox's base is this machine's system, read-only, with its Python in place of the base image's; what a stage
writes lies in a directory of its own. So all instructions run but the pull of the base, and those of the CUDA stages,
which install two gigabytes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from grpc import insecure_channel
from grpc_health.v1 import health_pb2, health_pb2_grpc

PATIENCE = 300  # seconds
OWN = ("app", "build", "dist", "src")  # what stages may write at the top level
STAGES = ("tools", "wheel", "packages-cpu", "serving", "cpu")
NOBODY = 65532

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bwrap is not installed: the Dockerfile is not executed"),
    pytest.mark.skipif(os.getuid() != 0, reason="only root can run it as another user"),
]


@dataclass(slots=True)
class Stage:
    """What a stage has made so far."""

    tree: Path
    environment: dict[str, str]
    directory: str = "/"
    user: int = 0
    entrypoint: list[str] = field(default_factory=list)
    health_check: list[str] = field(default_factory=list)

    def command(self, *arguments: str, mounts: tuple[str, ...] = (), writable: bool = False) -> list[str]:
        """Return the command that runs another inside."""
        command = ["bwrap", "--die-with-parent", "--unshare-pid", "--tmpfs", "/", "--clearenv"]
        for path in sorted(Path("/").iterdir()):
            if path.name not in {*OWN, "dev", "home", "models", "proc", "root", "state", "sys", "tmp", "work"}:
                command += (
                    ["--symlink", os.readlink(path), str(path)]
                    if path.is_symlink()
                    else ["--ro-bind", str(path), str(path)]
                )
        for parent in reversed(Path(sys.base_prefix).parents[:-1]):
            command += ["--perms", "0755", "--dir", str(parent)]  # or only root would find it
        command += ["--ro-bind", sys.base_prefix, sys.base_prefix, "--proc", "/proc", "--dev", "/dev"]
        for name in OWN:
            if (path := self.tree / name).is_dir():
                command += ["--bind" if writable else "--ro-bind", str(path), f"/{name}"]
        for name, value in self.environment.items():
            command += ["--setenv", name, value]
        command += [*mounts, "--remount-ro", "/", "--chdir", self.directory]
        if self.user:
            command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "setpriv", f"--reuid={self.user}"]
            command += [
                f"--regid={self.user}",
                "--clear-groups",
                "--inh-caps=-all",
                "--bounding-set=-all",
                "--no-new-privs",
            ]
        return [*command, *arguments]

    def run(self, line: str) -> None:
        """Execute a RUN."""
        for name in OWN:
            self.tree.joinpath(name).mkdir(exist_ok=True)
        temporary = ("--tmpfs", "/tmp")
        command = self.command("/bin/sh", "-c", line, mounts=temporary, writable=True)
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, f"{line}: {done.stdout} {done.stderr}"

    def copy(self, sources: list[Path], target: str) -> None:
        """Execute a COPY: a directory's content, or a file into a directory."""
        destination = self.tree / os.path.join(self.directory, target).lstrip("/")
        for source in sources:
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, destination, symlinks=True, dirs_exist_ok=True, ignore=ignored)
            else:
                destination.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, destination)

    def execute(self, each, origin: Path) -> None:
        """Execute an instruction; `origin` is what a COPY copies from."""
        match each.word:
            case "RUN":
                self.run(each.value)
            case "COPY":
                *sources, target = [word for word in each.words if not word.startswith("--")]
                self.copy([origin / source.lstrip("/") for source in sources], target)
            case "ENV":
                for word in each.words:
                    name, _, value = word.partition("=")
                    self.environment[name] = value.replace("${PATH}", self.environment["PATH"])
            case "WORKDIR":
                self.directory = each.value
                self.tree.joinpath(each.value.lstrip("/")).mkdir(exist_ok=True)
            case "USER":
                self.user = int(each.value.partition(":")[0])
            case "ENTRYPOINT":
                self.entrypoint = each.words
            case "HEALTHCHECK":
                self.health_check = json.loads(each.value.partition("CMD ")[2])
            case word:
                assert word in ("ARG", "LABEL", "EXPOSE", "STOPSIGNAL"), f"nobody executes {word}"


@pytest.fixture(scope="module")
def image(root, dockerfile, tmp_path_factory) -> Stage:
    """The CPU image, built."""
    system = {"PATH": f"{sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp"}
    system |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    stages: dict[str, Stage] = {}
    for each in dockerfile:
        if each.stage not in STAGES:
            continue
        if each.word == "FROM":
            base = stages.get(each.value.split()[0], Stage(tmp_path_factory.mktemp("base"), system))
            tree = tmp_path_factory.mktemp(each.stage)
            shutil.copytree(base.tree, tree, symlinks=True, dirs_exist_ok=True)
            stages[each.stage] = replace(base, tree=tree, environment=dict(base.environment))
        else:
            copied_from = next((word[7:] for word in each.value.split() if word.startswith("--from=")), None)
            stages[each.stage].execute(each, root if copied_from is None else stages[copied_from].tree)
    return stages["cpu"]


def process_within(process: int, program: str) -> Path:
    """Return /proc/.../status of the descendant of a process that runs a program."""
    waiting = [process]
    while waiting:
        directory = Path("/proc", str(waiting.pop()))
        if program in directory.joinpath("cmdline").read_text().split("\0")[:2]:
            return directory / "status"
        waiting += map(int, directory.joinpath(f"task/{directory.name}/children").read_text().split())
    raise LookupError(program)


def test_the_image_holds_the_service_and_no_training_stack(image) -> None:
    packages = next(image.tree.glob("app/lib/python3*/site-packages"))
    for name in ("service", "attendant", "onnxruntime"):
        assert packages.joinpath(name).is_dir(), name
    commands = {path.name for path in image.tree.glob("app/bin/attendant*")}
    assert commands == {"attendant", "attendant-serve"}
    for name in ("torch", "onnx", "transformers", "models", "export", "pip", "nvidia"):
        assert not packages.joinpath(name).exists(), name


def test_every_module_of_the_image_imports(image) -> None:
    line = (
        "import importlib, pkgutil, service, attendant\n"
        "for package in (service, attendant):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
    )
    done = subprocess.run(image.command("python", "-c", line), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_it_serves_as_nobody_from_a_read_only_tree_and_stops_when_told(
    image, tiny_repository, stopped, tmp_path
) -> None:
    writable = [tmp_path / "state", tmp_path / "tmp"]
    for directory in writable:
        directory.mkdir()
        os.chown(directory, NOBODY, NOBODY)
    models = shutil.copytree(tiny_repository, tmp_path / "models")
    models.chmod(0o755)
    mounts = ("--ro-bind", str(models), "/models")
    for directory in writable:
        mounts += ("--bind", str(directory), f"/{directory.name}")
    flags = ("--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", "--kv-memory", "64MiB")
    assert image.user == NOBODY
    server = subprocess.Popen(
        image.command(*image.entrypoint, *flags, mounts=mounts),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stopped.append(server)
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("LISTENING"), server.communicate()
    port = line.split("port ")[1].split(",")[0]
    with insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for update in stub.Watch(health_pb2.HealthCheckRequest(service="readiness"), timeout=60):
            if update.status == health_pb2.HealthCheckResponse.SERVING:
                break
    inside = process_within(server.pid, "/app/bin/attendant-serve")
    assert f"Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}" in inside.read_text()
    assert "CapEff:\t0000000000000000" in inside.read_text()
    for path in ("/app/x", "/models/x", "/x"):
        touched = subprocess.run(
            image.command("touch", path, mounts=mounts), capture_output=True, text=True, check=False
        )
        assert touched.returncode != 0, path

    image.environment["ATTENDANT_SERVER"] = f"127.0.0.1:{port}"
    healthy = image.command(*image.health_check, mounts=mounts)
    assert subprocess.run(healthy, timeout=60, check=False, stdout=subprocess.DEVNULL).returncode == 0
    os.kill(int(inside.parent.name), signal.SIGTERM)
    assert server.wait(60) == 0
    assert subprocess.run(healthy, timeout=60, check=False, stderr=subprocess.DEVNULL).returncode == 1
    assert list(tmp_path.glob("state/latency-*.json")), "what was learned is kept"
    assert not list(tmp_path.glob("tmp/*"))
