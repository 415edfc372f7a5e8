"""Our engine on a GPU beside Hugging Face transformers and the roofline, alternating, on the same shapes.

    python tests/benchmarks/gpu.py --repository build/gpu-bundles --model llama-7b --results build/report/llama-7b.json

What is measured is written after every round; the same command goes on where the last one stopped, and leaves with
status 3 while something is left to do. `--provider cpu` runs all of it on the CPU, `--provider host` our side by the
device's path on the host's memory: to prove the code and no speed.
"""

import argparse
import contextlib
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

sys.path.insert(0, str(Path(__file__).parents[2]))

import through_grpc
from gpu_cells import CONTEXTS, ROWS, SHAPES, Group, groups
from gpu_results import SIDES, Results, key, tables
from gpu_worker import Job, Worker, WorkerEnded
from served import serve
from workloads import Workload

from service.bundle import FoundBundle, scan

HERE = Path(__file__).parent
SCRIPTS = {"ours": HERE / "gpu_ours.py", "theirs": HERE / "gpu_transformers.py"}
UNFINISHED = 3
STREAMS = (1, 32)
SERVED_SECONDS = 60  # a server is not begun with, if less is left
# Far beyond any cache on the GPU; small on the CPU, where only the code is tried.
CEILING_SIZES = {"cuda": {"copied_bytes": 4 << 30, "matrix": 8192}, "cpu": {"copied_bytes": 64 << 20, "matrix": 512}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What to measure, and until when (`time.monotonic`)."""

    repository: Path
    model: str
    shape: str
    provider: str
    precision: str
    rounds: int
    steps: int
    threads: int
    compiled: bool
    deadline: float

    @property
    def device(self) -> str:
        """Where everything but our engine's memory is: "cuda", or "cpu"."""
        return "cuda" if self.provider == "cuda" else "cpu"


def given_to(side: str, run: Run, group: Group) -> dict[str, object]:
    """Return what a side is to load: its model, and room for the group's rows around its context."""
    shared = {"context": group.context, "steps": run.steps}
    if side == "ours":
        ours = {"repository": str(run.repository), "name": run.model, "provider": run.provider, "threads": run.threads}
        return {**ours, **shared, "slots": max(group.rows)}
    theirs = {"shape": asdict(SHAPES[run.shape]), "device": run.device, "compiled": run.compiled}
    return {**theirs, **shared, "precision": run.precision}


def asked(worker: Worker, do: str, **arguments: object) -> Job:
    """Return a worker's answer to a job; that it left is an answer too, unless it was made to."""
    try:
        return worker.ask(do, **arguments)
    except WorkerEnded as ended:
        if ended.made_to:
            raise
        return {"error": str(ended)}


def measure(run: Run, group: Group, results: Results, path: Path) -> None:
    """Measure the rounds that a group's cells still miss, the sides in turn where both are loaded."""
    jobs = [("decode", rows, {"rows": rows, "context": group.context, "steps": run.steps}) for rows in group.rows]
    if not group.apart:
        jobs.append(("prefill", 1, {"tokens": group.context}))
    for names in [(side,) for side in SIDES] if group.apart else [SIDES]:
        left = [
            (side, key(kind, group.context, rows), number, {"do": kind, **given})
            for kind, rows, given in jobs
            for number in range(run.rounds)
            for side in names
            if results.missing(key(kind, group.context, rows), side, run.rounds) > number
        ]
        if not left:
            continue
        with contextlib.ExitStack() as stack:
            workers = {side: stack.enter_context(Worker(SCRIPTS[side], run.deadline)) for side in names}
            told = {side: asked(worker, "load", **given_to(side, run, group)) for side, worker in workers.items()}
            if "result" in told.get("theirs", {}) and not results.ceilings:
                results.ceilings = asked(workers["theirs"], "ceilings", **CEILING_SIZES[run.device])["result"]
            for side, cell, number, job in left:
                print(f"{cell}, {side}, round {number + 1}", file=sys.stderr, flush=True)
                results.record(cell, side, told[side] if "error" in told[side] else asked(workers[side], **job))
                results.write(path)


def through_the_server(run: Run, results: Results, path: Path, flags: list[str]) -> None:
    """Measure a closed loop of callers through a real server, once for each number of streams."""
    left = [streams for streams in STREAMS if str(streams) not in results.served]
    if not left or "served" in results.failed:
        return
    if time.monotonic() > run.deadline - SERVED_SECONDS:
        raise WorkerEnded("no server was started any more", made_to=True)
    with serve(run.repository, [run.model], run.threads, ["--provider", run.device, *flags]) as served:
        for streams in left:
            workload = Workload(
                name=f"{streams} streams",
                streams=streams,
                requests=2 * streams,
                prompt_tokens=64,
                output_tokens=run.steps,
                vocab_size=SHAPES[run.shape].vocab_size,
            )
            rates = [through_grpc.run(served.address, run.model, workload) for _ in range(run.rounds)]
            results.served[str(streams)] = rates
            results.write(path)


def device_memory(provider: str) -> int:
    """Return the bytes that are free on the device that is to be measured."""
    if provider == "cuda":
        import pynvml

        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).free)
    from service.engine.device import HostDevice

    return HostDevice().memory()[0]


def main(argv: list[str] | None = None) -> int:
    """Measure what is left, print tables, and return the exit status."""
    given = _parser().parse_args(argv)
    found = [b for b in scan(given.repository) if isinstance(b, FoundBundle) and b.manifest.name == given.model]
    if not found:
        print(f"error: {given.repository} holds no sound bundle {given.model}: export it first", file=sys.stderr)
        return 1
    run = Run(
        repository=given.repository,
        model=given.model,
        shape=given.shape or given.model,
        provider=given.provider,
        precision=found[-1].manifest.precision,
        rounds=given.rounds,
        steps=given.steps,
        threads=given.threads,
        compiled=given.compiled,
        deadline=time.monotonic() + given.seconds,
    )
    manifest, shape = found[-1].manifest, SHAPES[run.shape]
    kept = sum(math.prod(axis for axis in state.axes if isinstance(axis, int)) for state in manifest.states)
    if (kept, manifest.vocabulary and manifest.vocabulary.size) != (shape.kept_per_token, shape.vocab_size):
        print(f"error: {manifest.key} has not the shape {run.shape}: name its own with --shape", file=sys.stderr)
        return 1
    results = Results.read(given.results, run.model, run.shape, run.provider)
    results.precision, results.sha256 = run.precision, found[-1].sha256
    memory = device_memory(run.provider) if given.memory_gib is None else int(given.memory_gib * 2**30)
    status = 0
    try:
        for group in groups(SHAPES[run.shape], run.precision, given.contexts, given.rows, run.steps, memory):
            measure(run, group, results, given.results)
        if given.served:
            try:
                through_the_server(run, results, given.results, given.flag)
            except (RuntimeError, subprocess.CalledProcessError) as error:  # the server or its client did not come up
                results.record("served", "ours", {"error": str(error)})
                results.write(given.results)
    except WorkerEnded as ended:
        print(f"{ended}: the time is over, run the same command again", file=sys.stderr)
        status = UNFINISHED
    print(tables(results))
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, required=True, help="where the bundle is")
    parser.add_argument("--model", required=True, help="its name")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="its shape, if its name does not say")
    parser.add_argument("--results", type=Path, required=True, help="the file to keep figures in, and to go on with")
    parser.add_argument("--provider", choices=("cuda", "cpu", "host"), default="cuda", help="default: %(default)s")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens; default: %(default)s")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="batch sizes; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="of each cell and side; default: %(default)s")
    parser.add_argument("--steps", type=int, default=32, help="of a round; default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=540, help="before it stops; default: %(default)s")
    parser.add_argument("--memory-gib", type=float, help="what both sides may use; default: what is free")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="theirs, by torch")
    parser.add_argument("--served", action=argparse.BooleanOptionalAction, default=True, help="through gRPC too")
    parser.add_argument("--flag", action="append", default=[], help="of the server, as in --flag=--kv-memory=8GiB")
    return parser


if __name__ == "__main__":
    sys.exit(main())
