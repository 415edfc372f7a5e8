"""Writes what the images install: every package with its version and hash, as pip resolves pyproject.toml.

    .venv/bin/python deploy/docker/lock.py

The versions are those of constraints.txt, so what is tested is what is served; the hashes are those of the wheels for
Linux on x86-64 and Python 3.11, whatever machine this runs on.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
HEADER = "# Written by deploy/docker/lock.py from pyproject.toml and constraints.txt: change those and run it again.\n"
PYTHON = "3.11"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def wanted() -> dict[str, list[str]]:
    """Return the requirements behind each lock, by the name of its file."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    project = pyproject["project"]
    # The CUDA libraries come as wheels too, so that both images stand on the same base.
    gpu = [
        each.replace("onnxruntime-gpu", "onnxruntime-gpu[cuda,cudnn]")
        for each in project["optional-dependencies"]["gpu"]
    ]
    return {
        "build.lock": pyproject["build-system"]["requires"],
        "cpu.lock": project["dependencies"] + project["optional-dependencies"]["cpu"],
        "cuda.lock": project["dependencies"] + gpu,
    }


def resolve(requirements: list[str]) -> str:
    """Return the lines of a lock: what pip would install for some requirements, and nothing else."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "--target", directory, "--constraint", str(ROOT / "constraints.txt")]
        command += ["--only-binary", ":all:", "--python-version", PYTHON]
        command += [argument for platform in PLATFORMS for argument in ("--platform", platform)]
        subprocess.run([*command, *requirements], check=True, stderr=subprocess.DEVNULL)
        found = json.loads(report.read_text("utf-8"))["install"]
    pins = {
        f"{each['metadata']['name'].lower()}=={each['metadata']['version']}": each["download_info"]["archive_info"][
            "hashes"
        ]["sha256"]
        for each in found
    }
    return HEADER + "".join(f"{pin} --hash=sha256:{pins[pin]}\n" for pin in sorted(pins))


if __name__ == "__main__":
    for name, requirements in wanted().items():
        HERE.joinpath(name).write_text(resolve(requirements), encoding="utf-8")
        print(f"{name} is written")
