"""Checkpoints of a fine-tuning job, by which it resumes and which are models by their own names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.jobs.database import now
from service.jobs.events import add_event
from service.jobs.ids import new_id, short_id
from service.jobs.pages import Page, paginate
from service.jobs.tables import Checkpoint, Job
from service.jobs.transitions import Claim, lock_held
from vlm_dft import run_dir


def tuned_name(job: Job) -> str:
    """ft:{root}:{project}:{suffix}:{short job id}, as OpenAI builds names."""
    return f"ft:{job.root}:{job.project}:{job.suffix or ''}:{short_id(job.id)}"


def record_checkpoint(s: Session, claim: Claim, checkpoint: run_dir.Checkpoint) -> bool:
    """Record a complete checkpoint; one of the same step, written by an earlier attempt, gives way. False: lease lost.

    A repetition changes nothing, so a worker may call this for every checkpoint it sees.
    """
    job = lock_held(s, claim)
    if job is None:
        return False
    path = str(checkpoint.path)
    known = s.scalars(select(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.step == checkpoint.step)).first()
    if known is not None:
        if known.path != path:
            known.path, known.metrics, known.created_at = path, checkpoint.metrics, now(s)
            s.flush()
        return True
    name = f"{tuned_name(job)}:ckpt-step-{checkpoint.step}"
    s.add(
        Checkpoint(
            id=new_id("ftckpt_"),
            job_id=job.id,
            name=name,
            step=checkpoint.step,
            path=path,
            metrics=checkpoint.metrics,
            created_at=now(s),
        )
    )
    s.flush()
    add_event(s, job.id, message=f"Checkpoint created at step {checkpoint.step} with name: {name}")
    return True


def forget_checkpoints(s: Session, claim: Claim, kept_steps: Collection[int]) -> bool:
    """Delete the rows of checkpoints that this attempt's trainer has pruned. Earlier attempts' stay. False: lease lost.

    kept_steps: steps of the complete checkpoints in this attempt's run directory.
    """
    if lock_held(s, claim) is None:
        return False
    rows = s.scalars(select(Checkpoint).where(Checkpoint.job_id == claim.job_id)).all()
    gone = [r.id for r in rows if r.step not in kept_steps and Path(r.path).is_relative_to(claim.run_path)]
    s.execute(delete(Checkpoint).where(Checkpoint.id.in_(gone)))
    return True


def forget_missing(s: Session, claim: Claim, complete: Collection[Path]) -> bool:
    """Delete the rows of earlier attempts' checkpoints that are not on disk. False: lease lost.

    A trainer that prunes one and a worker that dies before it can tell of it leave such a row behind.
    complete: paths of the complete checkpoints of earlier attempts.
    """
    if lock_held(s, claim) is None:
        return False
    rows = s.scalars(select(Checkpoint).where(Checkpoint.job_id == claim.job_id)).all()
    earlier = [row for row in rows if not Path(row.path).is_relative_to(claim.run_path)]
    s.execute(delete(Checkpoint).where(Checkpoint.id.in_([r.id for r in earlier if Path(r.path) not in complete])))
    return True


def newest_checkpoint(s: Session, job_id: str) -> Checkpoint | None:
    """The one with the largest step, whichever attempt wrote it."""
    return s.scalars(
        select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step.desc()).limit(1)
    ).first()


def list_checkpoints(s: Session, job_id: str, *, after: str | None = None, limit: int = 10) -> Page[Checkpoint]:
    """Newest first."""
    return paginate(s, select(Checkpoint).where(Checkpoint.job_id == job_id), Checkpoint, after=after, limit=limit)
