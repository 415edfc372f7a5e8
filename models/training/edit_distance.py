"""The Levenshtein distance, of which word and phoneme error rates are made."""

from collections.abc import Sequence


def edit_distance(left: Sequence[object], right: Sequence[object]) -> int:
    """Return the least number of insertions, deletions and replacements that turn one sequence into the other."""
    previous = list(range(len(right) + 1))
    for row, item in enumerate(left, 1):
        current = [row]
        for column, other in enumerate(right, 1):
            replaced = previous[column - 1] + (item != other)
            current.append(min(previous[column] + 1, current[-1] + 1, replaced))
        previous = current
    return previous[-1]
