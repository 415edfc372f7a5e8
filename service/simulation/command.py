"""`python -m service simulate`: what a trace would see of one machine, or of a fleet, and how many it needs."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

from service.scheduling.config import SchedulerConfig
from service.scheduling.latency import LatencyModel
from service.scheduling.row_buckets import row_buckets
from service.simulation.fleet import ROUTINGS, Run, simulate
from service.simulation.replica import Machine
from service.simulation.report import report
from service.simulation.slo import parse_slo, replicas_needed
from service.simulation.synthetic import Traffic
from service.simulation.table import searched, shown
from service.simulation.trace import Arrival, read_trace, write_trace
from service.simulation.virtual_engine import Laws

USAGE_ERROR = 2
NOT_ENOUGH = 1


class _Problem(ValueError):
    """The command line cannot be taken."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Problem(message)


def main(arguments: Sequence[str]) -> int:
    """Simulate, print, and return the exit status: 1 if no number of replicas that was allowed meets the SLO."""
    try:
        given = _parser().parse_args(arguments)
        arrivals = _arrivals(given)
        machine = _machine(given)
        targets = parse_slo(given.slo) if given.slo else ()
        bounds = _bounds(given.seq_buckets)
        if given.replicas < 1 or given.max_replicas < 1:
            raise _Problem("--replicas and --max-replicas must be at least 1")
        if given.write_trace:
            write_trace(given.write_trace, arrivals)
    except (ValueError, OSError) as error:
        print(f"{error}\n`python -m service simulate --help` lists the options", file=sys.stderr)
        return USAGE_ERROR

    def run(num_replicas: int) -> Run:
        return simulate(machine, arrivals, num_replicas, routing=given.routing, seed=given.seed)

    if not targets:
        found = report(run(given.replicas), bounds)
        print(json.dumps(asdict(found)) if given.json else shown(found))
        return 0
    needed, runs = replicas_needed(run, targets, given.max_replicas)
    found = report(runs[needed or max(runs)], bounds)
    if given.json:
        tried = {number: {target.text: target.value(one) for target in targets} for number, one in sorted(runs.items())}
        print(json.dumps({"replicas_needed": needed, "tried": tried, "report": asdict(found)}))
    else:
        print(f"{searched(runs, targets, needed)}\n\n{shown(found)}")
    return 0 if needed else NOT_ENOUGH


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m service simulate",
        description="Run the scheduler in virtual time, on engines of a known cost. docs/simulation.md has examples.",
        allow_abbrev=False,
    )
    traffic = parser.add_argument_group("what arrives: --trace, or --rate and --duration-seconds")
    traffic.add_argument("--trace", type=Path, metavar="FILE", help="JSON lines, or CSV")
    traffic.add_argument("--speed", type=float, default=1.0, help="the trace's rate times this")
    for name, kind, said in _TRAFFIC:
        traffic.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="…", help=said + _default(name))
    traffic.add_argument("--write-trace", type=Path, metavar="FILE", help="keep what arrived, as a trace")
    cost = parser.add_argument_group("what steps cost: --state-dir, or --law of both phases")
    cost.add_argument("--state-dir", type=Path, metavar="PATH", help="file that a server kept there, or the directory")
    cost.add_argument("--model", metavar="NAME", help='the bundle, "name/version", if the directory has several')
    cost.add_argument(
        "--law", action="append", default=[], metavar="PHASE=RUN,TOKEN,ATTENDED", help="seconds, of prefill and decode"
    )
    cost.add_argument("--overhead-seconds", type=float, default=0.001, help="of a step beside its runs (%(default)s)")
    machine = parser.add_argument_group("the machine")
    for name, default, said in _LIMITS:
        machine.add_argument(f"--{name}", type=int, default=default, metavar="…", help=f"{said} (%(default)s)")
    machine.add_argument(
        "--inter-token-target-seconds", type=float, default=0.1, metavar="…", help="sizes prefill steps (%(default)s)"
    )
    machine.add_argument("--ageing-seconds", type=float, default=10.0, metavar="…", help="(%(default)s)")
    machine.add_argument("--kv-tokens", type=int, metavar="…", help="positions in KV memory; default: all slots full")
    machine.add_argument("--prefix-reuse", action=argparse.BooleanOptionalAction, default=True)
    machine.add_argument(
        "--row-buckets",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="whether decode rows come in few sizes, as on a GPU",
    )
    machine.add_argument(
        "--send-deadlines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the server is told budgets, or clients hang up",
    )
    fleet = parser.add_argument_group("the fleet")
    fleet.add_argument("--replicas", type=int, default=1, help="machines (%(default)s)")
    fleet.add_argument("--routing", choices=ROUTINGS, default="least-loaded", help="(%(default)s)")
    fleet.add_argument("--slo", metavar="TARGETS", help='find the replicas it needs: "ttft_p95<0.5,goodput>0.99"')
    fleet.add_argument("--max-replicas", type=int, default=4096, help="to try (%(default)s)")
    parser.add_argument(
        "--seq-buckets", default="64,128,256,512,1024,2048,4096", metavar="…", help="prompt lengths (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


_TRAFFIC = (
    ("rate", float, "requests a second, in the mean"),
    ("duration_seconds", float, "of the arrivals"),
    ("burst_factor", float, "a burst's rate over the mean"),
    ("burst_share", float, "of the time that is burst"),
    ("burst_seconds", float, "length of a burst"),
    ("prompt_tokens", int, "median of short prompts"),
    ("output_tokens", int, "median of answers"),
    ("sigma", float, "spread: standard deviation of the logarithm"),
    ("long_share", float, "of prompts that are long"),
    ("long_tokens", int, "least length of those, which are Pareto"),
    ("most_tokens", int, "no prompt and no answer is longer"),
    ("budget_seconds", float, "after which a request is of no use"),
    ("seed", int, "of all that is drawn"),
)
_LIMITS = (
    ("max-num-seqs", 32, "sequences that run at once"),
    ("max-waiting-requests", 256, "before more are refused"),
    ("capacity", 8192, "longest sequence, in tokens"),
    ("prefill-chunk-tokens", 256, "longest prefill step while others decode"),
    ("idle-chunk-tokens", 512, "longest prefill step while nothing decodes"),
)


def _default(name: str) -> str:
    field = Traffic.__dataclass_fields__[name]
    return f" ({field.default})" if isinstance(field.default, int | float) else ""


def _arrivals(given: argparse.Namespace) -> list[Arrival]:
    drawn = {name: value for name, _, _ in _TRAFFIC if (value := getattr(given, name)) is not None}
    given.seed = drawn.get("seed", 0)
    if given.trace:
        if used := sorted(drawn.keys() - {"seed"}):
            raise _Problem(f"--{used[0].replace('_', '-')} is of drawn traffic; leave it out, or --trace")
        arrivals = read_trace(given.trace)
    elif missing := [name for name in ("rate", "duration_seconds") if name not in drawn]:
        raise _Problem(f"give --trace FILE, or --{missing[0].replace('_', '-')}")
    else:
        arrivals = Traffic(**drawn).arrivals()
    if not arrivals:
        raise _Problem("no request arrives: give a higher --rate or a longer --duration-seconds")
    if not given.speed > 0:
        raise _Problem(f"--speed is {given.speed}, must be positive")
    return [replace(arrival, arrival_seconds=arrival.arrival_seconds / given.speed) for arrival in arrivals]


def _machine(given: argparse.Namespace) -> Machine:
    if not given.overhead_seconds >= 0:
        raise _Problem(f"--overhead-seconds is {given.overhead_seconds}, must be at least 0")
    config = SchedulerConfig(
        num_slots=given.max_num_seqs,
        capacity=given.capacity,
        kv_budget=given.kv_tokens or given.max_num_seqs * given.capacity,
        chunk_tokens=given.prefill_chunk_tokens,
        idle_chunk_tokens=given.idle_chunk_tokens,
        inter_token_target=given.inter_token_target_seconds,
        ageing=given.ageing_seconds,
        reuses_prefixes=given.prefix_reuse,
        joins_prompts=True,
        row_buckets=row_buckets(given.max_num_seqs) if given.row_buckets else (),
    )
    return Machine(
        config=config,
        laws=_laws(given),
        overhead_seconds=given.overhead_seconds,
        max_waiting_requests=given.max_waiting_requests,
        sends_deadlines=given.send_deadlines,
    )


def _laws(given: argparse.Namespace) -> Laws:
    if bool(given.law) == bool(given.state_dir):
        raise _Problem("give either --state-dir, or --law prefill=… and --law decode=…")
    return Laws.parse(given.law) if given.law else learned_laws(given.state_dir, given.model)


def learned_laws(path: Path, model: str | None = None) -> Laws:
    """Return what a server learned and kept.

    Args:
        path: the file, or the directory of a single generating bundle, or of `model`.
        model: "name/version".

    Raises:
        OSError, ValueError: there is no such file, or it says too little.
    """
    found = {}
    for file in sorted(path.glob("latency-*.json")) if path.is_dir() else [path]:
        kept = json.loads(file.read_text("utf-8"))
        if not isinstance(kept, dict) or not isinstance(kept.get("learned"), dict):
            raise ValueError(f"{file} is not what a server keeps of a bundle's latency")
        if "decode" in kept["learned"] and model in (None, kept.get("model")):
            found[file] = kept["learned"]
    if len(found) != 1:
        names = ", ".join(str(file) for file in found) or "none"
        raise ValueError(f"{path} must hold what was kept of one generating bundle, it holds: {names}; give one file")
    latency = LatencyModel()
    latency.restore(next(iter(found.values())))
    return Laws.learned(latency)


def _bounds(text: str) -> tuple[int, ...]:
    bounds = tuple(int(part) for part in text.split(",") if part.strip())
    if sorted(set(bounds)) != list(bounds) or not bounds or bounds[0] < 1:
        raise _Problem(f"--seq-buckets is {text}, must be positive numbers that rise")
    return bounds
