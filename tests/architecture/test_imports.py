"""Who may import whom, and what a process that serves or calls never loads."""

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAINING_STACK = {"torch", "onnx", "onnxscript", "transformers", "gguf", "safetensors", "models", "export"}


def loaded_by(*modules: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after importing these."""
    program = f"import json, sys, {', '.join(modules)}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, cwd="/", timeout=60)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_the_import_contracts_of_pyproject_are_kept():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_the_service_starts_without_the_training_stack():
    loaded = loaded_by("service.__main__", "service.app")
    assert "onnxruntime" in loaded
    assert loaded & TRAINING_STACK == set()


def test_the_service_is_imported_in_seconds():
    """Best of three, for a machine that does other things too; measured: 0.7 s."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        loaded_by("service.app")
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 4


def test_the_client_loads_grpc_and_nothing_heavier():
    for module in ("attendant.client", "attendant.aio", "attendant.cli"):
        loaded = loaded_by(module)
        assert "grpc" in loaded
        assert loaded & (TRAINING_STACK | {"numpy", "pydantic", "onnxruntime", "tokenizers", "service"}) == set()


def test_the_client_package_costs_nothing_until_it_is_used():
    assert loaded_by("attendant") & {"grpc", "google"} == set()


def test_pure_scheduling_loads_the_standard_library_only():
    loaded = loaded_by("service.scheduling.scheduler", "service.scheduling.invariants")
    assert loaded - sys.stdlib_module_names - {"service", "__main__"} <= loaded_by("sys")


def test_proto_is_a_source_root_and_an_installed_package_of_that_name_wins(tmp_path):
    """A directory without __init__.py can be seen as a namespace; any real `proto`, wherever it is, comes first."""
    assert not (ROOT / "proto" / "__init__.py").exists()
    (tmp_path / "proto").mkdir()
    (tmp_path / "proto" / "__init__.py").touch()
    program = "import sys; sys.path.append(sys.argv[1]); import proto; print(proto.__file__)"
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60)
    assert Path(done.stdout.strip()) == tmp_path / "proto" / "__init__.py"


def test_nobody_imports_the_source_root():
    statement = re.compile(r"^\s*(import proto\b|from proto\b)", re.MULTILINE)
    sources = [path for room in ("proto", "service", "models", "export") for path in (ROOT / room).rglob("*.py")]
    assert len(sources) > 50
    assert [path for path in sources if statement.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("name", ["attendant", "service.text", "service.metrics", "service.engine", "models.attention"])
def test_everything_that_a_package_offers_exists(name):
    package = importlib.import_module(name)
    offered = getattr(package, "__all__", [])
    assert len(set(offered)) == len(offered)
    assert [public for public in offered if not hasattr(package, public)] == []


def test_what_the_client_offers_is_what_its_modules_define():
    import attendant

    assert sorted(attendant.__all__) == attendant.__all__
    assert set(attendant.__all__) <= set(dir(attendant))
    with pytest.raises(AttributeError, match="no attribute 'Clint'"):
        _ = attendant.Clint
