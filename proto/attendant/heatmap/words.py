"""What every drawing says in words: weights in few characters, entropies beside their maxima, sums that are unusual."""

from attendant.heatmap.maps import AttentionMap

NOTES = "beside each row: its entropy / the largest it could have, in nats"


def short(weight: float) -> str:
    """Return a weight with two decimals and no more characters than it needs; "" where they would be zeros."""
    text = f"{weight:.2f}"
    if text == "0.00":
        return ""
    return text.removesuffix(".00") if text.endswith(".00") else text.removeprefix("0")


def caption(head: AttentionMap) -> str:
    """Return a map's title, and its mean entropy beside the mean of the maxima."""
    entropy = f"mean entropy {head.mean_entropy:.2f} of at most {head.mean_maximum:.2f} nats"
    return f"{head.title}: {entropy}" if head.title else entropy


def notes(head: AttentionMap) -> list[str]:
    """Return what is said beside each row: entropy and maximum, and its sum where two decimals of it are not 1.00."""
    return [
        f"{entropy:.2f} / {maximum:.2f}" + (f"  sum {total:.3g}" if abs(total - 1.0) >= 0.005 else "")
        for entropy, maximum, total in zip(head.entropies, head.maxima, head.sums, strict=True)
    ]
