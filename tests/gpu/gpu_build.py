"""The guard: is what `import onnxruntime` finds the GPU build, and is all there that the service needs?

Both builds install the same directory, and the CPU's answers a request for CUDA with the CPU, without a word. So this
looks at what was really imported: `python tests/gpu/gpu_build.py --site FOLDER`, exit status 1 with every fault.
"""

import argparse
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnxruntime
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
CUDA = "CUDAExecutionProvider"


def build_faults(site: Path | None, wanted: str) -> list[str]:
    """Return why the imported ONNX Runtime is not the GPU build of a version, under a folder if it must be in one."""
    package = Path(onnxruntime.__file__).resolve().parent
    faults = []
    if site is not None and not package.is_relative_to(site.resolve()):
        faults.append(f"onnxruntime was imported from {package}, must lie under {site}: put that first on PYTHONPATH")
    if onnxruntime.__version__ != wanted:
        faults.append(f"onnxruntime is {onnxruntime.__version__}, must be {wanted}")
    if CUDA not in onnxruntime.get_available_providers():
        faults.append(f"onnxruntime has no {CUDA}, only {', '.join(onnxruntime.get_available_providers())}")
    if not (package / "capi" / "libonnxruntime_providers_cuda.so").is_file():
        faults.append(f"{package} has no libonnxruntime_providers_cuda.so: it is the CPU build")
    return faults


def session_faults() -> list[str]:
    """Return why a session that is asked for CUDA does not run there; empty if it does."""
    import numpy as np
    from onnx import TensorProto, helper

    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size]) for name, size in (("x", 4), ("y", 1))]
    # The largest of some numbers is what the sampler's graphs ask cuDNN for: it is loaded when it is first needed.
    graph = helper.make_graph([helper.make_node("ReduceMax", ["x"], ["y"])], "probe", tensors[:1], tensors[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[CUDA], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        return [f"a session on {CUDA} cannot be made: {error}"]
    if session.get_providers()[0] != CUDA:
        return [f"a session that was asked for {CUDA} runs on {session.get_providers()[0]}: a library or driver lacks"]
    try:
        (largest,) = session.run(None, {"x": np.arange(4, dtype=np.float32)})
    except Exception as error:
        return [f"a session on {CUDA} cannot run: {error}"]
    return [] if largest.tolist() == [3.0] else [f"a session on {CUDA} computes {largest.tolist()}, must be [3.0]"]


def requirement_faults(root: Path = ROOT) -> list[str]:
    """Return which of the service's requirements, GPU extra included, are not met."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    faults = []
    for line in (*project["dependencies"], *project["optional-dependencies"]["gpu"]):
        wanted = Requirement(line)
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            faults.append(f"{wanted.name} is not installed: {line} is needed")
        else:
            if not wanted.specifier.contains(found):
                faults.append(f"{wanted.name} is {found}: {line} is needed")
    return faults


def main(argv: list[str] | None = None) -> int:
    """Print every fault, or what was found, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, help="the folder that the GPU build was installed into")
    parser.add_argument("--version", required=True, help="what ONNX Runtime must be")
    parser.add_argument("--no-session", action="store_true", help="do not ask the device for a session")
    given = parser.parse_args(argv)
    faults = [*build_faults(given.site, given.version), *requirement_faults()]
    if not faults and not given.no_session:
        faults = session_faults()
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if not faults:
        print(f"onnxruntime {onnxruntime.__version__} of {Path(onnxruntime.__file__).parent}: {CUDA}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
