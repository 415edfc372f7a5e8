"""An `ExplainRequest` to inputs of an explain graph, and its weights to messages: the proto's limits are kept here.

Shapes: H heads, R rows, C columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import Explain, Places, WeightsSpec
from attendant.v1 import explain_pb2 as pb
from service.engine.explain_graph import Weights
from service.errors import InvalidField

MAX_SENT = 4_000_000  # weights, or entropies, of one answer
MAX_COMPUTED = 64_000_000  # weights of one run; the graph makes all of them, whichever are sent
_MESSAGE_WEIGHTS = 1 << 16

Labels = Mapping[Places, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Chosen:
    """One of the weights that are to be sent, and which of its heads."""

    spec: WeightsSpec
    heads: Sequence[int]


def choose(request: pb.ExplainRequest, told: Explain, num_heads: Mapping[str, int]) -> list[Chosen]:
    """Return what a request asks for, in the order of the manifest.

    Args:
        request: the request.
        told: what can be shown.
        num_heads: of each output.

    Raises:
        InvalidField: the model has no such kind, layer or head.
    """
    specs = told.weights
    kinds = list(dict.fromkeys(spec.kind for spec in specs))
    for index, kind in enumerate(request.kinds):
        if kind not in kinds:
            raise InvalidField(f"kinds[{index}]", kind, f"the model has {', '.join(kinds)}")
    specs = tuple(spec for spec in specs if not request.kinds or spec.kind in request.kinds)
    _check_each("layers", request.layers, 1 + max(spec.layer for spec in specs))
    _check_each("heads", request.heads, max(num_heads[spec.output] for spec in specs))
    chosen = []
    for spec in specs:
        heads = [head for head in range(num_heads[spec.output]) if not request.heads or head in request.heads]
        if heads and (not request.layers or spec.layer in request.layers):
            chosen.append(Chosen(spec, heads))
    return chosen


def check_cells(
    chosen: Sequence[Chosen],
    told: Explain,
    num_heads: Mapping[str, int],
    sizes: Mapping[Places, int],
    *,
    entropy_only: bool,
) -> None:
    """Refuse what would be too large, with what to ask for instead.

    Args:
        chosen: what would be sent.
        told: what is computed for it, which is everything.
        num_heads: of each output.
        sizes: how many places there are.
        entropy_only: whether weights are sent.

    Raises:
        InvalidField: a run would make, or an answer have, too many weights.
    """
    computed = sum(num_heads[spec.output] * sizes[spec.rows] * sizes[spec.columns] for spec in told.weights)
    if computed > MAX_COMPUTED:
        limit = f"the model would make {computed:,} weights, at most {MAX_COMPUTED:,} are computed: give a shorter one"
        raise InvalidField("input", f"{max(sizes.values())} tokens", limit)
    sent = sum(
        len(each.heads) * sizes[each.spec.rows] * (1 if entropy_only else sizes[each.spec.columns]) for each in chosen
    )
    if sent > MAX_SENT:
        limit = f"at most {MAX_SENT:,} are sent: name layers or heads, set entropy_only, or give a shorter input"
        raise InvalidField("input", f"{sent:,} values", limit)


def messages(
    model: str,
    chosen: Sequence[Chosen],
    labels: Labels,
    target_ids: Sequence[int],
    weights: Weights,
    *,
    sends_all: bool,
) -> Iterator[pb.ExplainResponse]:
    """Yield the answer; with `sends_all` weights and entropies, otherwise entropies alone."""
    yield pb.ExplainResponse(explanation=_explanation(model, chosen, labels, target_ids))
    for index, each in enumerate(chosen):
        for head in each.heads:
            of_head = weights[each.spec.output][head]
            step = max(1, _MESSAGE_WEIGHTS // of_head.shape[1])
            for first in range(0, len(of_head), step):
                rows = of_head[first : first + step]
                yield pb.ExplainResponse(
                    head=pb.HeadWeights(
                        layer=index,
                        head=head,
                        first_row=first,
                        entropies=entropy(rows).tolist(),
                        weights=rows.ravel().tolist() if sends_all else (),
                    )
                )


def entropy(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the entropy in nats of each row of weights [R, C]; exactly 0 of a single choice and of no weight."""
    wide = weights.astype(np.float64)
    logarithms = np.log(wide, out=np.zeros_like(wide), where=wide > 0)
    entropies: NDArray[np.float64] = np.abs((wide * logarithms).sum(axis=-1))  # what is summed is never above 0
    return entropies


def patch_labels(told: Explain) -> list[str]:
    """Name the patches of an image as cells of a spreadsheet, A1, B1, ..., A2; or "row,column" in a wider grid."""
    rows, columns = told.grid or (0, 0)
    names = [
        f"{ascii_uppercase[column]}{row + 1}" if columns <= len(ascii_uppercase) else f"{row + 1},{column + 1}"
        for row in range(rows)
        for column in range(columns)
    ]
    return ["class", *names] if told.class_token else names


def _explanation(model: str, chosen: Sequence[Chosen], labels: Labels, target_ids: Sequence[int]) -> pb.Explanation:
    used = list(dict.fromkeys(place for each in chosen for place in (each.spec.rows, each.spec.columns)))
    return pb.Explanation(
        model=model,
        layers=[
            pb.AttentionLayer(
                kind=each.spec.kind,
                layer=each.spec.layer,
                title=each.spec.title,
                heads=each.heads,
                rows=used.index(each.spec.rows),
                columns=used.index(each.spec.columns),
                left=each.spec.left,
                right=each.spec.right,
            )
            for each in chosen
        ],
        places=[pb.AttentionPlaces(kind=place.value, labels=labels[place]) for place in used],
        target_ids=target_ids,
    )


def _check_each(field: str, values: Sequence[int], count: int) -> None:
    for index, value in enumerate(values):
        if not 0 <= value < count:
            raise InvalidField(f"{field}[{index}]", value, f"the model has {field} 0 to {count - 1}")
