"""The job store under one name: ``from service.jobs import store``. Where each part lives:

submission   submit, submit_once              queries      get_job, list_jobs, list_attempts
leases       claim, renew, release, crash,    waiting      queue_position, requeue_silent
             reap, note_resume                events       add_event, record_metrics, list_events
completion   succeed, fail, cancelled,        checkpoints  record_checkpoint, forget_checkpoints, list_checkpoints
             cancel                           workers      register_worker, heartbeat_worker, list_workers, ...

Every function takes a Session first and never commits: the caller's ``with database.write()`` does. What a worker
writes is conditional on its Claim; the answer None or False means that the lease is lost.
"""

from service.jobs.checkpoints import forget_checkpoints, list_checkpoints, newest_checkpoint, record_checkpoint
from service.jobs.completion import cancel, cancelled, fail, succeed
from service.jobs.events import add_event, list_events, record_metrics
from service.jobs.leases import Renewal, claim, crash, note_resume, reap, release, renew
from service.jobs.pages import Page
from service.jobs.queries import get_job, list_attempts, list_jobs
from service.jobs.submission import NewJob, forget_old_keys, submit, submit_once
from service.jobs.transitions import Claim
from service.jobs.waiting import QueuePosition, queue_position, requeue_silent
from service.jobs.workers import (
    forget_dead_workers,
    forget_worker,
    heartbeat_worker,
    list_workers,
    register_worker,
)

__all__ = [
    "Claim",
    "NewJob",
    "Page",
    "QueuePosition",
    "Renewal",
    "add_event",
    "cancel",
    "cancelled",
    "claim",
    "crash",
    "fail",
    "forget_checkpoints",
    "forget_dead_workers",
    "forget_old_keys",
    "forget_worker",
    "get_job",
    "heartbeat_worker",
    "list_attempts",
    "list_checkpoints",
    "list_events",
    "list_jobs",
    "list_workers",
    "newest_checkpoint",
    "note_resume",
    "queue_position",
    "reap",
    "record_checkpoint",
    "record_metrics",
    "register_worker",
    "release",
    "renew",
    "requeue_silent",
    "submit",
    "submit_once",
    "succeed",
]
