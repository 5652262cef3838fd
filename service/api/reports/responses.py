"""What a report card says."""

from __future__ import annotations

from typing import Any, Literal

from service.api.comparisons.responses import Pair
from service.api.evaluations.view import EvaluationItem, ItemCounts
from service.api.schemas import ResponseModel
from vlm_dft.results import Score


class Check(ResponseModel):
    """One threshold of the gate against what was measured."""

    benchmark: str
    rule: Literal["min_value", "min_gain", "max_drop"]
    threshold: float
    measured: float | None
    """The score, or its difference to the base model's; null: there is no such score, which does not pass."""
    passed: bool
    reason: str


class Gate(ResponseModel):
    """Whether the model passes its owner's thresholds."""

    passed: bool
    checks: list[Check]


class ReportedBenchmark(ResponseModel):
    """One benchmark: the model before and after."""

    benchmark: str
    is_regression: bool
    """Whether it asks for what the model could do before and should still do (evaluation.regression)."""
    base: Score | None
    tuned: Score | None
    pair: Pair | None
    """tuned against base, item by item; null where only one of them was scored."""
    counts: ItemCounts
    samples: list[EvaluationItem]
    """First items of each kind: broken, fixed, wrong and right in both."""


class ReportCard(ResponseModel):
    """Everything that a reader needs to trust, or not to trust, a fine-tuned model."""

    object: Literal["fine_tuning.job.report"] = "fine_tuning.job.report"
    job_id: str
    created_at: int
    finished_at: int | None
    status: str
    model: str
    fine_tuned_model: str | None
    objective: str
    error: dict[str, Any] | None
    gate: Gate | None
    """Null where the request has none."""
    training: dict[str, Any] | None
    """Steps, tokens, losses before and after, as the trainer's result has them."""
    benchmarks: list[ReportedBenchmark]
    evaluation_error: dict[str, Any] | None
    attempts: int
    settings: dict[str, Any]
    """The resolved configuration."""
    fingerprints: dict[str, str | None]
    """data, model, and each benchmark's items: sha256."""
    environment: dict[str, Any]
    """Versions, device, precision, image backend."""
