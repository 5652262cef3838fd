"""A job's report card from its row and its run directories. Reads; changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from service.api.comparisons.requests import BASE
from service.api.comparisons.responses import BenchmarkResult
from service.api.comparisons.statistics import results, scoreboard
from service.api.evaluations.items import Filter, Flip, Table, find_run, items_of, open_predictions
from service.api.evaluations.requests import GateRule
from service.api.evaluations.view import EvaluationItem, ItemCounts, show_item
from service.api.jobs import whole, without_attempt_paths
from service.api.reports.responses import Check, Gate, ReportCard, ReportedBenchmark
from service.jobs.comparisons import Arm
from service.jobs.phases import Phase, openai_status
from service.jobs.tables import Attempt, Job

TUNED: Final = "tuned"
SAMPLES: Final[dict[Flip, int]] = {"broken": 3, "fixed": 3, "both_wrong": 2, "both_right": 2}
"""How many items of each kind are shown; what was lost first."""
_OF_TRAINING: Final = (
    "steps",
    "num_samples",
    "dropped_samples",
    "trained_tokens",
    "input_tokens",
    "first_nll",
    "last_nll",
    "valid_nll_before",
    "valid_nll_after",
    "wall_seconds",
    "stopped_early",
    "exported_step",
)
_OF_ENVIRONMENT: Final = ("device", "precision", "image_backend", "versions")


def report_card(job: Job, attempts: Sequence[Attempt]) -> ReportCard:
    """Of a fine-tuning, ended or not: what there is already. Reads its predictions: no place for a transaction."""
    paths = [Path(attempt.run_path) for attempt in attempts]
    result = job.result or {}
    trained: dict[str, Any] = result.get("train") or {}
    plan: Mapping[str, Any] = job.request.get("evaluation") or {}
    found = results(scoreboard([Arm(TUNED, job, tuple(attempts))]), BASE)
    benchmarks = [_benchmark(job, paths, each, plan.get("regression") or []) for each in found]
    assert job.model is not None, f"{job.id}: submit wrote it"
    return ReportCard(
        job_id=job.id,
        created_at=int(job.created_at),
        finished_at=whole(job.finished_at),
        status=openai_status(Phase(job.phase)),
        model=job.model,
        fine_tuned_model=job.fine_tuned_model,
        objective=job.config["train"]["objective"]["name"],
        error=job.error,
        gate=_gate([GateRule.model_validate(rule) for rule in plan.get("gate") or []], benchmarks),
        training={name: trained.get(name) for name in _OF_TRAINING} if trained else None,
        benchmarks=benchmarks,
        evaluation_error=result.get("evaluation_error"),
        attempts=len(paths),
        settings=without_attempt_paths(job.config),
        fingerprints=_fingerprints(job, trained, benchmarks),
        environment={name: trained.get(name) for name in _OF_ENVIRONMENT} if trained else {},
    )


def _benchmark(
    job: Job, paths: Sequence[Path], result: BenchmarkResult, regression: Sequence[str]
) -> ReportedBenchmark:
    counts, samples = _items(job, paths, result.benchmark)
    return ReportedBenchmark(
        benchmark=result.benchmark,
        is_regression=result.benchmark.lower() in {name.lower() for name in regression},
        base=result.scores.get(BASE),
        tuned=result.scores.get(TUNED),
        pair=next(iter(result.pairs), None),
        counts=counts,
        samples=samples,
    )


def _items(job: Job, paths: Sequence[Path], name: str) -> tuple[ItemCounts, list[EvaluationItem]]:
    now, before = (find_run(paths, role, name) for role in (TUNED, BASE))
    with (
        open_predictions(now.evaluation_path(TUNED, name) if now else None) as answers,
        open_predictions(before.evaluation_path(BASE, name) if before else None) as earlier,
    ):
        table = Table(answers, earlier, items_of(now.items_path(name)) if now else {})
        rows = [row for flip, most in SAMPLES.items() for row in table.page(Filter(flip=flip), 0, most)[0]]
        if before is None:
            rows = table.page(Filter(correct=False), 0, 5)[0] + table.page(Filter(correct=True), 0, 5)[0]
        return ItemCounts(**table.counts()), [show_item(job.id, name, TUNED, row) for row in rows]


def _gate(rules: Sequence[GateRule], benchmarks: Sequence[ReportedBenchmark]) -> Gate | None:
    if not rules:
        return None
    by_name = {each.benchmark.lower(): each for each in benchmarks}
    checks = [check for rule in rules for check in _checks(rule, by_name.get(rule.benchmark.lower()))]
    return Gate(passed=all(check.passed for check in checks), checks=checks)


def _checks(rule: GateRule, measured: ReportedBenchmark | None) -> list[Check]:
    base = measured.base.value if measured and measured.base else None
    tuned = measured.tuned.value if measured and measured.tuned else None
    gain = tuned - base if tuned is not None and base is not None else None
    pair = measured.pair if measured else None
    low = pair.low if pair and not pair.refused else None
    checks = []
    if rule.min_value is not None:
        passed = tuned is not None and tuned >= rule.min_value
        checks.append(_check(rule.benchmark, "min_value", rule.min_value, tuned, passed, "score"))
    if rule.min_gain is not None:
        passed = gain is not None and gain >= rule.min_gain
        checks.append(_check(rule.benchmark, "min_gain", rule.min_gain, gain, passed, "gain over the base model"))
    if rule.max_drop is not None:
        passed = low is not None and low >= -rule.max_drop
        what = "low end of the paired 95 % interval of the difference to the base model"
        checks.append(_check(rule.benchmark, "max_drop", rule.max_drop, low, passed, what))
    return checks


def _check(benchmark: str, rule: Any, threshold: float, measured: float | None, passed: bool, what: str) -> Check:
    bound = 0 - threshold if rule == "max_drop" else threshold
    shown = "was not measured" if measured is None else f"is {measured:.4f}"
    reason = f"{benchmark}: the {what} {shown}; it must be at least {bound:.4f}"
    return Check(benchmark=benchmark, rule=rule, threshold=threshold, measured=measured, passed=passed, reason=reason)


def _fingerprints(
    job: Job, trained: Mapping[str, Any], benchmarks: Sequence[ReportedBenchmark]
) -> dict[str, str | None]:
    found = {
        "data": trained.get("data_fingerprint") or job.request.get("data_fingerprint"),
        "model": trained.get("model_sha256"),
    }
    for each in benchmarks:
        score = each.tuned or each.base
        found[f"items of {each.benchmark}"] = score.items_sha256 if score else None
    return found
