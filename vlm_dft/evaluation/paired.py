"""Two models that answered the same items: how sure is their difference? Torch-free.

Items are not independent where a benchmark asks one problem in several versions, so whole groups of items are drawn
again by the bootstrap, and whole groups change sides in the permutation test. Where every group is one item, the
permutation test is McNemar's. Knows nothing about files or about how a benchmark makes its score of its items.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from typing import Final

import numpy as np

LEVEL: Final = 0.95
RESAMPLES: Final = 10_000
_SEED: Final = 0

Key = tuple[str, int]
"""Item and sample."""


@dataclass(frozen=True)
class Paired:
    """other against reference, over the items that both answered."""

    n: int
    """Answers compared: items, times samples of each."""
    groups: int
    """Of items that are drawn together."""
    fixed: int
    """Wrong in reference, right in other."""
    broken: int
    """Right in reference, wrong in other."""
    both_right: int
    both_wrong: int
    low: float
    high: float
    """Paired bootstrap interval of the difference in item accuracy, at LEVEL."""
    mcnemar_p: float | None
    """Exact, two-sided. None where an item was answered several times: the test knows one answer to an item."""
    permutation_p: float
    """Of swapping the two models' answers group by group, two-sided."""

    @property
    def told_apart(self) -> bool:
        """Whether chance alone would seldom make them differ so much."""
        return self.permutation_p < 1 - LEVEL

    @property
    def difference(self) -> float:
        """other - reference in item accuracy, in -1..1."""
        return (self.fixed - self.broken) / self.n


def compare(reference: Mapping[Key, bool], other: Mapping[Key, bool], group_of: Mapping[str, str]) -> Paired:
    """Both models' verdicts on the same answers. group_of: item -> group; an item without one is its own.

    Raises ValueError when the two did not answer the same, or nothing.
    """
    if reference.keys() != other.keys() or not reference:
        alone = len(reference.keys() ^ other.keys())
        raise ValueError(f"the models must have answered the same items: {alone} answers have no counterpart")
    outcomes = Counter((reference[key], other[key]) for key in reference)
    fixed, broken = outcomes[False, True], outcomes[True, False]
    differences: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for (item, sample), was in reference.items():
        group = group_of.get(item) or item
        differences[group] += other[item, sample] - was
        sizes[group] += 1
    kinds = Counter((differences[group], sizes[group]) for group in sizes)
    low, high = _interval(kinds)
    one_answer_each = len({item for item, _ in reference}) == len(reference)
    return Paired(
        n=len(reference),
        groups=len(sizes),
        fixed=fixed,
        broken=broken,
        both_right=outcomes[True, True],
        both_wrong=outcomes[False, False],
        low=low,
        high=high,
        mcnemar_p=mcnemar(fixed, broken) if one_answer_each else None,
        permutation_p=_permutation(Counter(differences.values())),
    )


def mcnemar(fixed: int, broken: int) -> float:
    """Exact two-sided p: were both models equally good, how often would a split at least this uneven come by chance?"""
    n, smaller = fixed + broken, min(fixed, broken)
    # Whole numbers up to the one division: 2**-n alone is zero for a float from n = 1075 on.
    return min(1.0, 2 * sum(comb(n, k) for k in range(smaller + 1)) / 2**n)


def _interval(kinds: Mapping[tuple[int, int], int]) -> tuple[float, float]:
    """Percentile bootstrap over groups. kinds: (difference, size) -> how many groups are like that.

    Drawing groups is drawing kinds with their shares, which costs nothing however many groups there are.
    """
    num_groups = sum(kinds.values())
    if not any(difference for difference, _ in kinds):
        # Drawing again finds no flip where none was seen: so many groups rule out flips in more than this share.
        bound = 1 - ((1 - LEVEL) / 2) ** (1 / num_groups)
        return -bound, bound
    difference_K, size_K = (np.array([kind[place] for kind in kinds]) for place in (0, 1))
    shares_K = np.array(list(kinds.values())) / num_groups
    drawn_RK = np.random.default_rng(_SEED).multinomial(num_groups, shares_K, size=RESAMPLES)
    ratios_R = (drawn_RK @ difference_K) / (drawn_RK @ size_K)
    low, high = np.quantile(ratios_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _permutation(differences: Mapping[int, int]) -> float:
    """Sign flips of groups. differences: of a group -> how many groups have it; exact where all are of one size."""
    observed = abs(sum(value * count for value, count in differences.items()))
    by_size: dict[int, int] = defaultdict(int)
    for value, count in differences.items():
        if value:
            by_size[abs(value)] += count
    if not by_size:
        return 1.0
    if len(by_size) == 1:
        ((size, count),) = by_size.items()
        return mcnemar((count + observed // size) // 2, (count - observed // size) // 2)
    generator = np.random.default_rng(_SEED)
    sums_R = sum(size * (2 * generator.binomial(count, 0.5, size=RESAMPLES) - count) for size, count in by_size.items())
    # Plus one on both sides: the observed assignment is one of those that chance may give.
    return float((np.count_nonzero(np.abs(sums_R) >= observed) + 1) / (RESAMPLES + 1))
