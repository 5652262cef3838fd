"""How a comparison is shown. Reads rows and, through ``statistics``, predictions; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from service.api.comparisons.requests import BASE
from service.api.comparisons.responses import (
    ArmListed,
    ArmShown,
    ComparisonListed,
    ComparisonShown,
    Difference,
    Terms,
)
from service.api.comparisons.statistics import results, scoreboard, sweep
from service.api.jobs import job_error, progress_state
from service.errors import InvalidRequestError
from service.jobs.comparison_tables import Comparison
from service.jobs.comparisons import Arm
from service.jobs.phases import Phase, openai_status
from service.jobs.tables import Job

_NOT_SETTINGS = ("run_id", "supervision", "trace")
"""Parts of a resolved config that say nothing about what is trained."""


def show_comparison(comparison: Comparison, arms: Sequence[Arm], reference: str | None = None) -> ComparisonShown:
    """reference: an arm, or base; None: the first arm. Raises InvalidRequestError for a name that is none of them.

    Reads every arm's predictions: no place for an open transaction.
    """
    board = scoreboard(arms)
    chosen = reference or arms[0].name
    known = [arm.name for arm in arms] + [BASE]
    if chosen not in known:
        raise InvalidRequestError(f"reference: {chosen!r} is none of {', '.join(known)}", param="reference")
    return ComparisonShown(
        **_head(comparison, [arm.job for arm in arms]),
        reference=chosen,
        arms=[_show_arm(arm) for arm in arms],
        differences=_differences(arms),
        terms=_terms(arms),
        benchmarks=results(board, chosen),
        sweep=sweep(arms, board),
    )


def list_comparison(comparison: Comparison, jobs: Mapping[str, Job]) -> ComparisonListed:
    """jobs: arm -> job, in order."""
    arms = [ArmListed(**_arm_head(name, job)) for name, job in jobs.items()]
    return ComparisonListed(**_head(comparison, list(jobs.values())), arms=arms)


def _head(comparison: Comparison, jobs: Sequence[Job]) -> dict[str, Any]:
    return {
        "id": comparison.id,
        "name": comparison.name,
        "created_at": int(comparison.created_at),
        "status": _status([openai_status(Phase(job.phase)) for job in jobs]),
        "model": jobs[0].model,
        "training_file": jobs[0].training_file,
    }


def _arm_head(name: str, job: Job) -> dict[str, Any]:
    return {
        "name": name,
        "job_id": job.id,
        "status": openai_status(Phase(job.phase)),
        "phase": job.phase,
        "fine_tuned_model": job.fine_tuned_model,
    }


def _status(statuses: Sequence[str]) -> str:
    if all(status == "queued" for status in statuses):
        return "queued"
    ended = {"succeeded", "failed", "cancelled"}
    if not ended.issuperset(statuses):
        return "running"
    return next((status for status in ("failed", "cancelled") if status in statuses), "succeeded")


def _show_arm(arm: Arm) -> ArmShown:
    job, train = arm.job, arm.job.config["train"]
    trained = (job.result or {}).get("train") or {}
    numbers: dict[str, Any] = {
        name: trained.get(name) for name in ("steps", "last_nll", "valid_nll_before", "valid_nll_after")
    }
    return ArmShown(
        **_arm_head(arm.name, job),
        objective=train["objective"]["name"],
        learning_rate=train["learning_rate"],
        batch_size=train["batch_size"],
        seed=train["seed"],
        progress=progress_state(job),
        error=job_error(job),
        trained_tokens=job.trained_tokens,
        wall_seconds=trained.get("wall_seconds"),
        **numbers,
    )


def _differences(arms: Sequence[Arm]) -> list[Difference]:
    flat = {arm.name: dict(_flat(arm.job.config)) for arm in arms}
    fields = dict.fromkeys(field for values in flat.values() for field in values)
    found = []
    for field in fields:
        values = {name: each.get(field) for name, each in flat.items()}
        if any(value != values[arms[0].name] for value in values.values()):
            found.append(Difference(field=field, values=values))
    return found


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if not prefix and name in _NOT_SETTINGS:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _terms(arms: Sequence[Arm]) -> Terms:
    trained = [(arm.job.result or {}).get("train") for arm in arms]
    steps = {train["steps"] for train in trained if train}
    return Terms(
        same_data=_one(arm.job.request.get("data_fingerprint") for arm in arms),
        same_order=_one((arm.job.config["train"]["seed"], arm.job.config["train"]["batch_size"]) for arm in arms),
        same_steps=None if None in trained else len(steps) == 1,
        same_evaluation=_one(arm.job.config.get("evaluation") for arm in arms),
    )


def _one(values: Iterator[Any]) -> bool:
    """Whether all are equal."""
    first, *others = values
    return all(other == first for other in others)
