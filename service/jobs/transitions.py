"""The one way in which a job changes phase: a conditional UPDATE that checks phase and fence.

``leases.renew`` alone writes a phase by itself, because there everything is one statement.

Who may call for which transition is the business of ``submission``, ``leases`` and ``completion``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.jobs.phases import ACTIVE, Kind, Phase, phases_before
from service.jobs.tables import Document, Job


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One worker's hold on one job: the fence that each of its writes must still match, and what it needs to run."""

    job_id: str
    project: str
    kind: Kind
    attempt: int
    fence: int
    worker: str
    config: Document
    """RunConfig without supervision and train.resume_from, which the worker adds."""
    run_path: Path
    """Run directory of this attempt, absolute; the worker creates it."""
    resume_checkpoint: Path | None
    """Newest recorded checkpoint of any attempt. The worker that recorded it may have died before recording a newer
    one, or after its trainer pruned this one: look in previous_run_paths for what is really on disk."""
    resume_step: int | None
    previous_run_paths: tuple[Path, ...]
    """Run directories of earlier attempts, newest first."""
    origin: Document
    """Of the request that submitted the job, for logs and traces."""


def move(
    s: Session, job_id: str, after: Phase, *, before: Iterable[Phase], if_fence: int | None = None, **values: Any
) -> Job | None:
    """Move the job to ``after`` if it is in one of ``before``, the transition is legal and the fence still matches.

    Returns the moved job; None: nothing moved.
    """
    allowed = sorted(frozenset(before) & phases_before(after))
    statement = update(Job).where(Job.id == job_id, Job.phase.in_(allowed))
    if if_fence is not None:
        statement = statement.where(Job.fence == if_fence)
    statement = statement.values(phase=after, **values).returning(Job)
    return s.scalars(statement, execution_options={"populate_existing": True}).one_or_none()


def lock_held(s: Session, claim: Claim) -> Job | None:
    """The claim's job, locked until the transaction ends; None when the claim no longer holds it."""
    statement = (
        select(Job)
        .where(Job.id == claim.job_id, Job.fence == claim.fence, Job.phase.in_(sorted(ACTIVE)))
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    return s.scalars(statement).one_or_none()
