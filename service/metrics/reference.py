"""docs/metrics.md, made from the catalogue: `python -m service.metrics` prints it.

What a label can be is read off the children that are made at the start, so the page cannot promise others.
"""

from itertools import groupby, pairwise

from prometheus_client import CollectorRegistry, Metric

from service.metrics.catalogue import Family
from service.metrics.gpu import GPU_FAMILIES
from service.metrics.server import ServerMetrics

_LATENCY = "Latency, by sequence length"
_COST = "What a length costs"

_HEAD = """# Metrics

<!-- Made by `make docs` from service/metrics; a test compares them. -->

`http://<host>:8002/metrics`, in Prometheus' text format or OpenMetrics, by what the scraper asks for. The same port
answers `/healthz` (no engine is stuck, the event loop turns) and `/readyz` (requests are welcome), and `/` with a page
for people. It has threads of its own, which share the interpreter with the event loop: a scrape may hold up a token for
the 5 ms after which Python changes threads.

`model` is the full name, "name/version", of a bundle of the repository; calls that name anything else count under
`_unknown`, so no request can make a series. Everything about a model exists from the moment it begins to load, so rates
start at zero; other codes and tasks than a model's own appear with the first such call, from a closed list. One model
makes about 1,270 series; a test keeps it under 1,500 whatever clients send.

With OpenMetrics (`Accept: application/openmetrics-text`, which Prometheus sends; it keeps them with
`--enable-feature=exemplar-storage`) the buckets of latencies carry an exemplar, the `request_id` of the newest request
that fell into them, as clients gave it or as `Started` told it; of gaps between tokens only those over the objective.

`deploy/prometheus/` has recording and alerting rules for these names, docs/operations.md what to do about each alert.
"""

_INTRODUCTIONS = {
    _LATENCY: """\
`seq_bucket` is the upper bound of a length in tokens: 64, 128, ..., 4096, +Inf (`--seq-buckets`; bounds that the
model cannot exceed are left out). Objectives are exact bounds, so that a share of requests within one can be read off.
In a query, bounds are spelt as Python writes floats: `le="0.5"`, `le="10.0"`.

    histogram_quantile(0.95, sum by (le, seq_bucket) (rate(attendant_time_to_first_token_seconds_bucket[5m])))
""",
    "Objectives": """\
`--slo-first-token-seconds` and `--slo-inter-token-seconds` set the objectives. The share of requests over one is what
the alerts of error budgets look at.
""",
    _COST: """\
Every run of a graph, from the checks at load on, teaches the bundle's latency model, one law for each phase:

    seconds = constant x runs + linear x tokens + quadratic x attended positions

`attended positions` are those that attention reads, summed over the tokens: `tokens x (start + tokens / 2)` of a
prefill chunk, the sum of the contexts of all rows of a decode step, `rows x length^2` of an encoder's batch. So
`quadratic` is the price of attention, and `constant` what a step costs that does nothing.
""",
    "KV cache": """\
Memory is counted in tokens (positions) over all slots of a model; only models that generate have it. Nothing that was
admitted is ever thrown out for others, so there is no count of preemptions.
""",
    "The server": """\
`grpc_server_*` have the names and labels that gRPC servers of any language use.
""",
}

_TAIL = """## GPU

Only where NVIDIA's driver and the package `nvidia-ml-py` (extra `gpu`) are installed and a device is there.

{gpu}
`process_*` and `python_gc_*` are the process's memory, CPU time, file descriptors and garbage collections, as
everywhere.
"""


def page() -> str:
    """Return docs/metrics.md."""
    metrics = ServerMetrics()
    for task in ("generate", "embed"):
        metrics.model(f"{task}/1", longest=8192, task=task)
    values = _label_values(metrics.registry)
    parts = [_HEAD]
    for section, families in groupby(metrics.families, key=lambda family: family.section):
        parts += [f"## {section}\n", *filter(None, [_INTRODUCTIONS.get(section)]), _table(list(families), values)]
    gpu = [f"| `{name}` | gauge | {unit} | `gpu`, `name` | {text} |" for name, text, unit in GPU_FAMILIES]
    return "\n".join(parts) + "\n" + _TAIL.format(gpu="\n".join([*_TABLE_HEAD, *gpu, ""]))


_TABLE_HEAD = ("| name | type | unit | labels | meaning |", "|---|---|---|---|---|")


def _table(families: list[Family], values: dict[tuple[str, str], list[str]]) -> str:
    return "\n".join([*_TABLE_HEAD, *(_row(family, values) for family in families), ""])


def _row(family: Family, values: dict[tuple[str, str], list[str]]) -> str:
    labels = ", ".join(_label(name, values.get((family.name, name), [])) for name in family.labels)
    bounds = f" Buckets: {_bounds(family.bounds)}." if family.bounds else ""
    return f"| `{family.name}` | {family.kind} | {family.unit} | {labels} | {family.meaning}{bounds} |"


def _label(name: str, values: list[str]) -> str:
    shown = "" if name in ("model", "seq_bucket") or not values else f" ({', '.join(values)})"
    return f"`{name}`{shown}"


def _bounds(bounds: tuple[float, ...]) -> str:
    """Name every bound, or the rule of most and the others."""
    odd = [b for a, b in pairwise(bounds) if b < 1.99 * a]
    if len(bounds) > 14 and len(odd) == 2:  # an objective lies between two that double
        objective = next(bound for bound in bounds if bound in odd)
        return f"{bounds[0]:g} x 2^i to {bounds[-1]:.3g}, and {objective:g}"
    return ", ".join(f"{bound:g}" for bound in bounds)


def _label_values(registry: CollectorRegistry) -> dict[tuple[str, str], list[str]]:
    """Return the values of each label of each family that are there before anything happens, in their order."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for family in registry.collect():
        for sample in family.samples:
            for label, value in sample.labels.items():
                found.setdefault((_full_name(family), label), {})[value] = None
    return {key: list(values) for key, values in found.items()}


def _full_name(family: Metric) -> str:
    return family.name + ("_total" if family.type == "counter" else "")
