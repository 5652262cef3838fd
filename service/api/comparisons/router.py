"""/v1/fine_tuning/comparisons: several fine-tunings on equal terms, from one request to one table."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Query

from service.api.comparisons.requests import CreateComparison
from service.api.comparisons.resolve import resolve_arms
from service.api.comparisons.responses import ComparisonCurves, ComparisonShown, Curve
from service.api.comparisons.view import show_comparison
from service.api.dependencies import After, DatabaseNow, Limit, Project, RegistryNow, SettingsNow, WakeUp
from service.api.fine_tuning.downsampling import NAMES, downsample
from service.api.once import IdempotencyKey, RetryCount
from service.api.runs import merged_metrics
from service.api.schemas import ListPage
from service.errors import InvalidRequestError
from service.jobs import comparisons, store
from service.jobs.phases import TERMINAL, Phase

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
    background: BackgroundTasks,
    wake_up: WakeUp,
    idempotency_key: IdempotencyKey = None,
    x_stainless_retry_count: RetryCount = 0,
) -> ComparisonShown:
    """Queue all arms, or none: an arm that cannot be trained as it stands refuses the whole comparison."""
    request = body.model_dump(mode="json", exclude_unset=True)
    canonical = json.dumps(request, sort_keys=True)
    arms = resolve_arms(database, project, body, settings, registry)
    with database.write() as s:
        comparison = comparisons.create(
            s,
            project,
            body.name or " or ".join(list(arms)[:4]),
            request,
            lambda: arms,
            key=idempotency_key,
            body_sha256=hashlib.sha256(f"comparison {canonical}".encode()).hexdigest(),
            retry_count=x_stainless_retry_count,
        )
        shown = show_comparison(s, comparison)
    background.add_task(wake_up)
    return shown


@router.get("")
def list_comparisons(
    project: Project, database: DatabaseNow, after: After = None, limit: Limit = 20
) -> ListPage[ComparisonShown]:
    """List comparisons, newest first."""
    with database.read() as s:
        page = comparisons.list_comparisons(s, project, after=after, limit=limit)
        return ListPage.of([show_comparison(s, each) for each in page.rows], page.has_more)


@router.get("/{comparison_id}")
def retrieve_comparison(
    comparison_id: str, project: Project, database: DatabaseNow, reference: Reference = None
) -> ComparisonShown:
    """One comparison: its arms, on which terms they compete, and the results of those that have ended."""
    with database.read() as s:
        return show_comparison(s, comparisons.get_comparison(s, project, comparison_id), reference)


@router.post("/{comparison_id}/cancel")
def cancel_comparison(comparison_id: str, project: Project, database: DatabaseNow) -> ComparisonShown:
    """Cancel every arm that has not ended."""
    with database.write() as s:
        comparison = comparisons.get_comparison(s, project, comparison_id)
        for arm in comparisons.arms_of(s, comparison):
            if Phase(arm.job.phase) not in TERMINAL:
                store.cancel(s, project, arm.job.id)
        s.expire_all()
        return show_comparison(s, comparison)


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
        attempts = {arm.name: store.list_attempts(s, arm.job.id) for arm in arms}
    curves = [
        Curve(
            arm=arm.name,
            job_id=arm.job.id,
            points=downsample(merged_metrics(attempts[arm.name], 0, None), resolution, names),
        )
        for arm in arms
    ]
    return ComparisonCurves(comparison_id=comparison_id, data=curves)
