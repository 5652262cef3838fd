"""Submit a resolved request exactly once, however often a retrying client sends it. Knows no kind of job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from fastapi import BackgroundTasks, Depends, Header, Request
from pydantic import BaseModel
from sqlalchemy.orm import Session

from service.api.dependencies import DatabaseNow, Project, WakeUp
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


New = TypeVar("New")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Resolved:
    """A job that can be queued, and what its owner should know: written as events of level warn."""

    new: NewJob
    notes: tuple[str, ...] = ()


class _NotSeenBeforeError(Exception):
    """The request is new; only ever raised to leave a transaction."""


@dataclass(frozen=True)
class Submission:
    """How this request is submitted: for whom, under which key, and who is woken by what it makes."""

    project: str
    database: Database
    background: BackgroundTasks
    wake_up: Callable[[], object]
    api_key_id: str | None
    """The caller's stored key; None: the service's own key, or none was needed."""
    key: str | None
    """The Idempotency-Key."""
    retry_count: int

    def job(self, body: BaseModel, resolve: Callable[[], Resolved]) -> Job:
        """The job of this request.

        A repetition gives the first one's job even when it could not be resolved any more. Raises IdempotencyError.
        """
        sha256 = body_sha256(body)

        def submit(s: Session, new: Callable[[], Resolved]) -> Job:
            resolved: list[Resolved] = []

            def make_job() -> NewJob:
                resolved.append(new())
                return replace(resolved[0].new, api_key_id=self.api_key_id)

            job = submit_once(s, self.project, self.key, sha256, make_job, retry_count=self.retry_count)
            for note in (note for each in resolved for note in each.notes):  # none for a repetition
                add_event(s, job.id, level="warn", message=note)
            return job

        return self.once(submit, resolve)

    def once(self, submit: Callable[[Session, Callable[[], New]], Made], resolve: Callable[[], New]) -> Made:
        """What submit makes of what is resolved, which it asks for only when the request is not known.

        Resolving may take seconds, so it happens outside the transaction that writes, and only for what is new.
        """
        made = self._known(submit) if self.key is not None or self.retry_count > 0 else None
        if made is None:
            resolved = resolve()
            with self.database.write() as s:
                made = submit(s, lambda: resolved)
        self.background.add_task(self.wake_up)
        return made

    def _known(self, submit: Callable[[Session, Callable[[], Any]], Made]) -> Made | None:
        """What was made of this request before."""
        try:
            with self.database.write() as s:
                return submit(s, _refuse)
        except _NotSeenBeforeError:
            return None


async def submission_of(
    request: Request,
    project: Project,
    database: DatabaseNow,
    background: BackgroundTasks,
    wake_up: WakeUp,
    idempotency_key: IdempotencyKey = None,
    x_stainless_retry_count: RetryCount = 0,
) -> Submission:
    """Of a request that makes jobs."""
    key_id = request.state.caller.key_id
    return Submission(project, database, background, wake_up, key_id, idempotency_key, x_stainless_retry_count)


SubmissionNow = Annotated[Submission, Depends(submission_of)]


def body_sha256(body: BaseModel) -> str:
    """Equal for two requests of one kind that ask for the same."""
    canonical = json.dumps(body.model_dump(mode="json", exclude_unset=True), sort_keys=True)
    return hashlib.sha256(f"{type(body).__name__} {canonical}".encode()).hexdigest()


def _refuse() -> Any:
    raise _NotSeenBeforeError
