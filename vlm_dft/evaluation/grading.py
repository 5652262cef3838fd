"""How one response is graded, and how grades become a number with its standard error. Torch-free.

``native-rules/v1``: the answer is found as ``answers`` says and compared by each benchmark's own rule. Without a mark
of the model's own, MathVision and We-Math are graded exactly as VLMEvalKit grades them before it asks a judge.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from vlm_dft.evaluation.answers import Rule
from vlm_dft.evaluation.items import Item

SCORER = "native-rules/v1"
JUDGE = "none"
UNKNOWN_STANDARD_ERROR = 0.5
"""For fewer than two groups: the largest that a mean of values in 0..1 can have."""

Rates = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Grade:
    """What became of one response."""

    extracted: str | None
    """The answer that was compared; None when none was found, which counts as wrong."""
    rule: Rule
    """Which rule, or the judge, found it."""
    correct: bool


NO_ANSWER = Grade(None, "none", False)


@dataclass(frozen=True)
class Outcome:
    """One scored unit: an item, or a We-Math step group."""

    value: float
    """0..1."""
    group: str
    """Units of one group are not independent: five versions of one problem."""
    stratum: str = ""
    """Units are averaged within their stratum first: a MathVerse version."""


@dataclass(frozen=True)
class Estimate:
    """numerator / denominator, and its standard error."""

    numerator: float
    denominator: float
    standard_error: float

    @property
    def value(self) -> float:
        return self.numerator / self.denominator


@dataclass(frozen=True)
class Summary:
    """What a benchmark makes of its grades; ``score`` adds who answered and how."""

    metric: str
    outcomes: tuple[Outcome, ...]
    by_category: Rates
    whole: bool

    @property
    def estimate(self) -> Estimate:
        return mean_over_strata(self.outcomes)


def average(passes: Sequence[Summary]) -> Summary:
    """average@k of k passes over the same items: every number is the mean over passes; pass@k stands beside it.

    Passes over one item are not independent: the standard error is that of the items' means.
    """
    if len(passes) == 1:
        return passes[0]
    k, first = len(passes), passes[0]
    together = list(zip(*(summary.outcomes for summary in passes), strict=True))
    means = [replace(units[0], value=math.fsum(unit.value for unit in units) / k) for units in together]
    best = mean_over_strata([replace(units[0], value=max(unit.value for unit in units)) for units in together])
    rates: Rates = {f"pass@{k}": {"value": best.value, "n": float(len(together))}}
    for name, numbers in first.by_category.items():
        rates[name] = {key: math.fsum(summary.by_category[name][key] for summary in passes) / k for key in numbers}
    metric = f"average@{k}" if first.metric == "acc" else f"{first.metric}_average@{k}"
    return Summary(metric, tuple(means), rates, first.whole)


def mean_over_strata(outcomes: Sequence[Outcome]) -> Estimate:
    """Unweighted mean over strata of the mean in each stratum, with a standard error clustered by group.

    With S strata of n_s units and mean m_s, a group g contributes u_g = sum over its units of (x - m_s) / (S n_s), and

        SE = sqrt(G / (G - 1) * sum over the G groups of u_g^2)

    For one stratum and groups of one unit this is the textbook sqrt(variance / n), with n - 1 in the variance.
    """
    assert outcomes, "a benchmark has at least one item"
    by_stratum: dict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        by_stratum[outcome.stratum].append(outcome.value)
    means = {stratum: math.fsum(values) / len(values) for stratum, values in by_stratum.items()}
    contributions: dict[str, float] = defaultdict(float)
    for outcome in outcomes:
        weight = 1 / (len(by_stratum) * len(by_stratum[outcome.stratum]))
        contributions[outcome.group] += (outcome.value - means[outcome.stratum]) * weight
    groups = len(contributions)
    squares = math.fsum(contribution**2 for contribution in contributions.values())
    error = math.sqrt(groups / (groups - 1) * squares) if groups > 1 else UNKNOWN_STANDARD_ERROR
    if len(by_stratum) == 1:
        values = next(iter(by_stratum.values()))
        return Estimate(math.fsum(values), len(values), error)
    return Estimate(math.fsum(means.values()), len(means), error)


def accuracies(items: Iterable[Item], grades: Mapping[str, Grade], names: Sequence[tuple[str, ...]]) -> Rates:
    """Accuracy and n per category; each name is one category or a combination of several, in the order they come."""
    counts: dict[str, list[int]] = {}
    chosen = list(items)
    for name in names:
        for item in chosen:
            if all(part in item.categories for part in name):
                key = "; ".join(f"{part}: {item.categories[part]}" for part in name)
                count = counts.setdefault(key, [0, 0])
                count[0] += grades[item.id].correct
                count[1] += 1
    return {key: {"value": correct / n, "n": float(n)} for key, (correct, n) in counts.items()}
