"""Thousands of steps as a few hundred points, for drawing: means that stay means, and the extremes beside them.

Steps are cut into stretches of equally many records. A mean over tokens is weighted by its number of tokens, so that
the whole keeps its mean; counts are added; of time, epoch and attempt the last is kept; the rest is a mean over steps.
Nothing is smoothed. Knows nothing about files or jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

from vlm_dft.results import AccuracyPoint, StepMetrics, ValidationMetrics

Record = dict[str, Any]

_COUNTS: Final = frozenset({"num_tokens", "input_tokens", "num_samples", "valid_num_tokens"})
_LAST: Final = frozenset({"time", "epoch", "attempt"})
# Which count is the denominator of a number.
_WEIGHT_OF: Final[dict[str, str]] = {
    "objective_loss": "num_tokens",
    "nll": "num_tokens",
    "mean_weight": "num_tokens",
    "share_p_below_01": "num_tokens",
    "share_p_above_09": "num_tokens",
    "entropy": "num_tokens",
    "token_accuracy": "num_tokens",
    "kl": "num_tokens",
    "valid_nll": "valid_num_tokens",
    "valid_objective_loss": "valid_num_tokens",
    "valid_token_accuracy": "valid_num_tokens",
}
NAMES: Final = frozenset(
    {*StepMetrics.model_fields, *ValidationMetrics.model_fields, *AccuracyPoint.model_fields, "attempt"}
    - {"step", "probe_benchmark", "probe_metric"}
)
"""The numbers that a record may have."""


def downsample(records: Sequence[Record], resolution: int, keys: Sequence[str] = ()) -> list[Record]:
    """At most ``resolution`` records for these, which are ordered by step; all of them unchanged if they are so few.

    A point has step (its last), first_step, num_steps, each number over its stretch, and min and max of each mean.
    keys: only these numbers; none: all.
    """
    if len(records) <= resolution:
        return [_only(record, keys) for record in records]
    bounds = [len(records) * index // resolution for index in range(resolution + 1)]
    return [_point(records[low:high], keys) for low, high in pairwise(bounds)]


def _only(record: Record, keys: Sequence[str]) -> Record:
    return {key: record[key] for key in ("step", *keys) if key in record} if keys else record


def _point(records: Sequence[Record], keys: Sequence[str]) -> Record:
    names = keys or sorted({key for record in records for key in record} & NAMES)
    point: Record = {"step": records[-1]["step"], "first_step": records[0]["step"], "num_steps": len(records)}
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    for key in names:
        with_value = [record for record in records if record.get(key) is not None]
        if not with_value:
            continue
        values = [record[key] for record in with_value]
        if key in _COUNTS or key in _LAST:
            point[key] = sum(values) if key in _COUNTS else values[-1]
            continue
        point[key] = _mean(with_value, values, _WEIGHT_OF.get(key))
        low[key], high[key] = min(values), max(values)
    return point | {"min": low, "max": high}


def _mean(records: Sequence[Record], values: Sequence[float], weight: str | None) -> float:
    if weight is None:
        return sum(values) / len(values)
    weights = [record[weight] for record in records]
    return sum(value * each for value, each in zip(values, weights, strict=True)) / sum(weights)
