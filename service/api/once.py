"""Submit a resolved request exactly once, however often a retrying client sends it. Knows no kind of job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Request
from pydantic import BaseModel
from sqlalchemy.orm import Session

from service.jobs.database import Database
from service.jobs.store import NewJob, add_event, submit_once
from service.jobs.tables import Job

IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=200, description="The same key and body within 24 hours make one job."),
]
RetryCount = Annotated[
    int,
    Header(ge=0, le=100, description="Sent by the stock client; a body that is repeated with > 0 makes no second job."),
]


async def api_key_id_of(request: Request) -> str | None:
    """The stored key of the caller; None: the service's own key, or none was needed."""
    return request.state.caller.key_id


New = TypeVar("New")
Made = TypeVar("Made")
ApiKeyId = Annotated[str | None, Depends(api_key_id_of)]


@dataclass(frozen=True)
class Resolved:
    """A job that can be queued, and what its owner should know: written as events of level warn."""

    new: NewJob
    notes: tuple[str, ...] = ()


class _NotSeenBeforeError(Exception):
    """The request is new; only ever raised to leave a transaction."""


def submit_resolved(
    database: Database,
    project: str,
    body: BaseModel,
    resolve: Callable[[], Resolved],
    *,
    key: str | None,
    retry_count: int,
    api_key_id: str | None = None,
) -> Job:
    """The job of this request.

    A repetition gives the first one's job even when it could not be resolved any more. Raises IdempotencyError.
    """
    sha256 = body_sha256(body)

    def submit(s: Session, new: Callable[[], Resolved]) -> Job:
        resolved: list[Resolved] = []

        def make_job() -> NewJob:
            resolved.append(new())
            return replace(resolved[0].new, api_key_id=api_key_id)

        job = submit_once(s, project, key, sha256, make_job, retry_count=retry_count)
        for note in (note for each in resolved for note in each.notes):  # none for a repetition
            add_event(s, job.id, level="warn", message=note)
        return job

    return once(database, submit, resolve, may_be_known=key is not None or retry_count > 0)


def once(
    database: Database,
    submit: Callable[[Session, Callable[[], New]], Made],
    resolve: Callable[[], New],
    *,
    may_be_known: bool,
) -> Made:
    """What submit makes of what is resolved, which it asks for only when the request is not known.

    Resolving may take seconds, so it happens outside the transaction that writes, and only for what is new.
    """
    if may_be_known:
        try:
            with database.write() as s:
                return submit(s, _refuse)
        except _NotSeenBeforeError:
            pass
    resolved = resolve()
    with database.write() as s:
        return submit(s, lambda: resolved)


def body_sha256(body: BaseModel) -> str:
    """Equal for two requests of one kind that ask for the same."""
    canonical = json.dumps(body.model_dump(mode="json", exclude_unset=True), sort_keys=True)
    return hashlib.sha256(f"{type(body).__name__} {canonical}".encode()).hexdigest()


def _refuse() -> Any:
    raise _NotSeenBeforeError
