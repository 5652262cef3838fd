"""/v1/evaluations/{id}/items: what models answered, item by item, and the pictures that they saw.

Takes an evaluation, or a fine-tuning job that evaluates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse

from service.api.dependencies import After, DatabaseNow, Limit, Project
from service.api.evaluations.items import (
    Filter,
    Flip,
    Table,
    find_picture,
    find_run,
    items_of,
    open_predictions,
)
from service.api.evaluations.view import ItemCounts, ItemPage, show_item
from service.errors import InvalidRequestError, NotFoundError
from service.jobs import store
from service.jobs.database import Database
from vlm_dft.evaluation.comparison import comparable
from vlm_dft.evaluation.predictions import SCORE_NAME
from vlm_dft.results import Score
from vlm_dft.run_dir import RunDir

router = APIRouter()

Role = Literal["base", "tuned"]
BenchmarkQuery = Annotated[str | None, Query(max_length=100, description="Not given: the first one.")]


@router.get("/evaluations/{job_id}/items")
def list_items(
    job_id: str,
    project: Project,
    database: DatabaseNow,
    benchmark: BenchmarkQuery = None,
    role: Annotated[Role, Query(description="Which model of a job that tunes one.")] = "tuned",
    correct: Annotated[bool | None, Query(description="Only right, or only wrong answers.")] = None,
    flip: Annotated[Flip | None, Query(description="Only items whose verdict did so against the one before.")] = None,
    q: Annotated[str | None, Query(max_length=255, description="Text in question, reference or answer.")] = None,
    category: Annotated[
        str | None, Query(max_length=255, description="As by_category names it: subject: algebra.")
    ] = None,
    against: Annotated[
        str | None, Query(max_length=255, description="Another job, whose tuned model stands in the base's place.")
    ] = None,
    after: After = None,
    limit: Limit = 20,
) -> ItemPage:
    """Every prediction of one benchmark in its order, each beside the base model's where the job scored one."""
    name, run_paths = _runs(database, project, job_id, benchmark)
    wanted = Filter(correct, flip, q, category)
    if against is not None:
        _, others = _runs(database, project, against, name)
        before = _comparable(run_paths, others, role, name, against)
    else:
        base = find_run(run_paths, "base", name) if role == "tuned" else None
        before = base.evaluation_path("base", name) if base else None
    run = find_run(run_paths, role, name)
    start = _start(after)
    with (
        open_predictions(run.evaluation_path(role, name) if run else None) as now,
        open_predictions(before) as earlier,
    ):
        table = Table(now, earlier, items_of(run.items_path(name)) if run else {})
        rows, has_more = table.page(wanted, start, limit)
        counts = ItemCounts(**table.counts())
    data = [show_item(job_id, name, role, row) for row in rows]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return ItemPage(data=data, has_more=has_more, first_id=first, last_id=last, counts=counts)


_image: dict[int | str, dict[str, Any]] = {200: {"content": {"image/*": {}}, "description": "The picture."}}


@router.get("/evaluations/{job_id}/items/{item_id:path}/image", response_class=FileResponse, responses=_image)
def item_image(
    job_id: str, item_id: str, project: Project, database: DatabaseNow, benchmark: BenchmarkQuery = None
) -> FileResponse:
    """The picture of an item, by the benchmark's own id, encoded as the benchmark has it."""
    name, run_paths = _runs(database, project, job_id, benchmark)
    found = find_picture(run_paths, name, item_id)
    if found is None:
        message = f"{job_id} has no picture of the item {item_id!r} of {name}"
        raise NotFoundError(message, param="item_id", code="image_not_found")
    path, media_type = found
    headers = {"cache-control": "private, max-age=31536000, immutable", "x-content-type-options": "nosniff"}
    return FileResponse(path, media_type=media_type, headers=headers)


def _runs(database: Database, project: str, job_id: str, benchmark: str | None) -> tuple[str, list[Path]]:
    """The benchmark's name, and the run directories of the job's attempts, oldest first."""
    with database.read() as s:
        job = store.get_job(s, project, job_id)
        attempts = store.list_attempts(s, job_id)
    names = [each["name"] for each in ((job.config.get("evaluation") or {}).get("benchmarks") or [])]
    if not names:
        raise InvalidRequestError(f"{job_id} evaluates nothing: its request has no benchmarks", param="job_id")
    name = benchmark or names[0]
    if name not in names:
        message = f"benchmark: {job_id} does not score {name!r}; it scores {', '.join(names)}"
        raise InvalidRequestError(message, param="benchmark")
    return name, [Path(attempt.run_path) for attempt in attempts]


def _comparable(run_paths: list[Path], others: list[Path], role: Role, name: str, against: str) -> Path:
    """Directory of the other's predictions. Raises InvalidRequestError where they must not stand side by side."""
    now = _score(find_run(run_paths, role, name), role, name)
    run = find_run(others, "tuned", name)
    before = _score(run, "tuned", name)
    if run is None or now is None or before is None:
        which = "this one" if now is None else against
        raise InvalidRequestError(f"against: {which} has no score of {name} yet: wait for its end", param="against")
    if reason := comparable(before, now):
        message = f"against: the two must not be compared on {name}: {reason}: score both alike"
        raise InvalidRequestError(message, param="against", code="scores_not_comparable")
    return run.evaluation_path("tuned", name)


def _score(run: RunDir | None, role: Role, name: str) -> Score | None:
    try:
        return Score.model_validate_json((run.evaluation_path(role, name) / SCORE_NAME).read_bytes()) if run else None
    except FileNotFoundError:
        return None


def _start(after: str | None) -> int:
    """Number of the line after the named item: item-20 is the twentieth."""
    if after is None:
        return 0
    number = after.removeprefix("item-")
    if not (after.startswith("item-") and number.isdecimal() and len(number) < 12):
        raise InvalidRequestError(f"after: there is no {after!r} in this list", param="after")
    return int(number)
