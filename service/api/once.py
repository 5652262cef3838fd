"""Submit a resolved request exactly once, however often a retrying client sends it. Knows no kind of job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic import BaseModel

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
    """The job of this request. Resolving may take seconds, so it happens outside the transaction that writes.

    A repetition gives the first one's job even when it could not be resolved any more. Raises IdempotencyError.
    """
    canonical = json.dumps(body.model_dump(mode="json", exclude_unset=True), sort_keys=True)
    sha256 = hashlib.sha256(f"{type(body).__name__} {canonical}".encode()).hexdigest()
    if key is not None or retry_count > 0:
        try:
            with database.write() as s:
                return submit_once(s, project, key, sha256, _refuse, retry_count=retry_count)
        except _NotSeenBeforeError:
            pass
    resolved = resolve()
    new = replace(resolved.new, api_key_id=api_key_id)
    with database.write() as s:
        job = submit_once(s, project, key, sha256, lambda: new, retry_count=retry_count)
        if job.attempt == 0 and job.last_event_seq == 1:  # ours, not that of a repetition which was faster
            for note in resolved.notes:
                add_event(s, job.id, level="warn", message=note)
        return job


def _refuse() -> NewJob:
    raise _NotSeenBeforeError
