"""Numbers as a line of bars, for terminals. Knows nothing about what they are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

_BARS = "▁▂▃▄▅▆▇█"
_WITH_BLANK = " " + _BARS
WIDTH = 40


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Means of up to width stretches as bars from the lowest to the highest, both printed after it."""
    if not values:
        return ""
    count = min(width, len(values))
    bounds = [len(values) * index // count for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means) + f" {low:.3g}..{high:.3g}"


def bars(counts: Sequence[int]) -> str:
    """A histogram: one character for each bin, as high as its share of the largest; one that is not empty shows."""
    largest = max(counts) or 1
    return "".join(_WITH_BLANK[-(-count * (len(_WITH_BLANK) - 1) // largest)] for count in counts)
