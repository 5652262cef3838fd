"""What a comparison answers."""

from __future__ import annotations

from typing import Any, Literal

from service.api.jobs import JobError, ProgressState
from service.api.schemas import ResponseModel
from vlm_dft.results import Score


class ArmListed(ResponseModel):
    """One arm in a list of comparisons."""

    name: str
    job_id: str
    status: str
    phase: str
    fine_tuned_model: str | None


class ArmShown(ArmListed):
    """One arm and how far it is."""

    objective: str
    learning_rate: float
    batch_size: int
    seed: int
    progress: ProgressState | None
    error: JobError | None
    steps: int | None
    """Null before the training has ended, as all below."""
    trained_tokens: int | None
    last_nll: float | None
    """Raw NLL of the last steps, whatever the objective: one axis for all arms."""
    valid_nll_before: float | None
    valid_nll_after: float | None
    wall_seconds: float | None


class Difference(ResponseModel):
    """A setting in which the arms are not alike."""

    field: str
    """Path in resolved_config."""
    values: dict[str, Any]
    """Arm -> value."""


class Terms(ResponseModel):
    """Whether the arms compete on equal terms; null: not known before they have trained."""

    same_data: bool
    """By the data's fingerprint."""
    same_order: bool
    """Samples in the same order: one seed and one batch size."""
    same_steps: bool | None
    same_evaluation: bool


class Pair(ResponseModel):
    """One arm against the reference on one benchmark, item by item."""

    arm: str
    reference: str
    refused: str | None
    """Why the two must not be compared; the numbers are null then."""
    n: int | None = None
    """Answers compared."""
    groups: int | None = None
    """Of items that belong together, such as a problem's versions: the independent evidence."""
    difference: float | None = None
    """In item accuracy, -1..1; positive: the arm is better."""
    low: float | None = None
    high: float | None = None
    """95 % interval of the difference: paired bootstrap over groups, 10,000 resamples."""
    mcnemar_p: float | None = None
    """Exact, two-sided, items taken as independent; null where items were answered several times."""
    permutation_p: float | None = None
    """Two-sided, whole groups swapped."""
    told_apart: bool | None = None
    """Whether permutation_p is below 0.05. Of twenty pairs that are equal, one is, by chance."""
    fixed: int | None = None
    broken: int | None = None
    both_right: int | None = None
    both_wrong: int | None = None


class BenchmarkResult(ResponseModel):
    """All arms on one benchmark."""

    benchmark: str
    scores: dict[str, Score]
    """Arm -> score; base: the model before, where the request includes it."""
    pairs: list[Pair]


class Cell(ResponseModel):
    """Arms that differ in their seed alone."""

    objective: str
    options: dict[str, Any]
    learning_rate: float
    batch_size: int
    arms: list[str]
    value: str
    """What is averaged: valid_nll_after, or a benchmark's metric as mathverse.mean_over_versions."""
    n: int
    """Arms that have a value."""
    mean: float | None
    standard_deviation: float | None
    """Over the seeds, n - 1 in the denominator; null for fewer than two."""


class _Comparison(ResponseModel):
    id: str
    object: Literal["fine_tuning.comparison"] = "fine_tuning.comparison"
    name: str
    created_at: int
    status: str
    """queued, running, succeeded (every arm has), failed or cancelled (all have ended, some of them so)."""
    model: str
    training_file: str


class ComparisonListed(_Comparison):
    """A comparison in a list: its results are asked for by its id."""

    arms: list[ArmListed]


class ComparisonShown(_Comparison):
    """A comparison and, arm by arm as they end, its results."""

    reference: str
    arms: list[ArmShown]
    differences: list[Difference]
    terms: Terms
    benchmarks: list[BenchmarkResult]
    sweep: list[Cell]


class Curve(ResponseModel):
    """One arm's numbers over its steps."""

    arm: str
    job_id: str
    points: list[dict[str, Any]]
    """step, and the numbers that were asked for; min and max beside them where steps were drawn together."""


class ComparisonCurves(ResponseModel):
    """Learning curves of all arms on one axis."""

    object: Literal["fine_tuning.comparison.curves"] = "fine_tuning.comparison.curves"
    comparison_id: str
    data: list[Curve]
