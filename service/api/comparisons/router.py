"""/v1/fine_tuning/comparisons: several fine-tunings on equal terms, from one request to one table."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy.orm import Session

from service.api.comparisons.requests import CreateComparison
from service.api.comparisons.resolve import resolve_arms
from service.api.comparisons.responses import ComparisonCurves, ComparisonListed, ComparisonShown, Curve
from service.api.comparisons.view import list_comparison, show_comparison
from service.api.dependencies import After, DatabaseNow, Limit, Project, RegistryNow, SettingsNow
from service.api.fine_tuning.downsampling import NAMES, Record, downsample
from service.api.once import Resolved, SubmissionNow, body_sha256
from service.api.runs import merged_metrics
from service.api.schemas import ListPage
from service.errors import InvalidRequestError, InvalidStateError
from service.jobs import comparisons, store
from service.jobs.comparison_tables import Comparison
from service.jobs.comparisons import Arm
from service.jobs.phases import TERMINAL, Phase
from service.jobs.store import NewJob
from service.jobs.tables import Attempt

router = APIRouter(prefix="/v1/fine_tuning/comparisons", tags=["comparisons"])

Keys = Annotated[str, Query(max_length=500, description="Numbers to draw, with commas between them.")]
Resolution = Annotated[int, Query(ge=10, le=2000, description="Most points of one arm.")]
Reference = Annotated[
    str | None, Query(max_length=64, description="The arm, or base, that others are compared with; else the first.")
]


@router.post("")
def create_comparison(
    body: CreateComparison,
    project: Project,
    database: DatabaseNow,
    settings: SettingsNow,
    registry: RegistryNow,
    submission: SubmissionNow,
) -> ComparisonShown:
    """Queue all arms, or none: an arm that cannot be trained as it stands refuses the whole comparison."""

    def submit(s: Session, new: Callable[[], dict[str, Resolved]]) -> tuple[Comparison, list[Arm]]:
        resolved: dict[str, Resolved] = {}

        def make_jobs() -> dict[str, NewJob]:
            resolved.update(new())
            return {name: replace(arm.new, api_key_id=submission.api_key_id) for name, arm in resolved.items()}

        comparison = comparisons.create(
            s,
            project,
            body.name or body.names_of_arms(),
            body.model_dump(mode="json", exclude_unset=True),
            make_jobs,
            key=submission.key,
            body_sha256=body_sha256(body),
            retry_count=submission.retry_count,
        )
        arms = comparisons.arms_of(s, comparison)
        for arm in arms if resolved else ():  # none for a repetition
            for note in resolved[arm.name].notes:
                store.add_event(s, arm.job.id, level="warn", message=note)
        return comparison, arms

    made = submission.once(submit, lambda: resolve_arms(database, project, body, settings, registry))
    return show_comparison(*made)


@router.get("")
def list_comparisons(
    project: Project, database: DatabaseNow, after: After = None, limit: Limit = 20
) -> ListPage[ComparisonListed]:
    """List comparisons, newest first, without their results."""
    with database.read() as s:
        page = comparisons.list_comparisons(s, project, after=after, limit=limit)
        jobs = comparisons.jobs_of(s, page.rows)
    return ListPage.of([list_comparison(each, jobs[each.id]) for each in page.rows], page.has_more)


@router.get("/{comparison_id}")
def retrieve_comparison(
    comparison_id: str, project: Project, database: DatabaseNow, reference: Reference = None
) -> ComparisonShown:
    """One comparison: its arms, on which terms they compete, and the results of those that have ended."""
    with database.read() as s:
        comparison = comparisons.get_comparison(s, project, comparison_id)
        arms = comparisons.arms_of(s, comparison)
    return show_comparison(comparison, arms, reference)


@router.post("/{comparison_id}/cancel")
def cancel_comparison(comparison_id: str, project: Project, database: DatabaseNow) -> ComparisonShown:
    """Cancel every arm that has not ended."""
    with database.write() as s:
        for arm in comparisons.arms_of(s, comparisons.get_comparison(s, project, comparison_id)):
            with suppress(InvalidStateError):  # it has ended, perhaps while the others were asked to
                store.cancel(s, project, arm.job.id)
    return retrieve_comparison(comparison_id, project, database)


@router.get("/{comparison_id}/curves")
def comparison_curves(
    comparison_id: str,
    project: Project,
    database: DatabaseNow,
    keys: Keys = "nll,valid_nll,probe_value",
    resolution: Resolution = 300,
) -> ComparisonCurves:
    """Learning curves of all arms: raw NLL by default, which is the same measure whatever an arm's objective."""
    names = [name for name in keys.split(",") if name]
    for name in names:
        if name not in NAMES:
            message = f"keys: there is no number {name!r}; there are {', '.join(sorted(NAMES))}"
            raise InvalidRequestError(message, param="keys")
    with database.read() as s:
        arms = comparisons.arms_of(s, comparisons.get_comparison(s, project, comparison_id))
    curves = [Curve(arm=arm.name, job_id=arm.job.id, points=_points(arm, resolution, tuple(names))) for arm in arms]
    return ComparisonCurves(comparison_id=comparison_id, data=curves)


def _points(arm: Arm, resolution: int, names: tuple[str, ...]) -> list[Record]:
    runs = tuple((attempt.attempt, attempt.run_path) for attempt in arm.attempts)
    read = _points_of_ended if Phase(arm.job.phase) in TERMINAL else _points_of
    return read(runs, resolution, names)


def _points_of(runs: tuple[tuple[int, str], ...], resolution: int, names: tuple[str, ...]) -> list[Record]:
    attempts = [Attempt(attempt=number, run_path=path) for number, path in runs]
    return downsample(merged_metrics(attempts, 0, None), resolution, names)


# A page asks for all arms again and again, and of those that have ended nothing changes any more.
_points_of_ended = lru_cache(maxsize=256)(_points_of)
