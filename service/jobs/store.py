"""The job store under one name: ``from service.jobs import store``. Where each part lives:

submission   submit, submit_once              queries      get_job, list_jobs, list_attempts
leases       claim, renew, wanted_stop,       waiting      Places, queue_position, requeue_silent
             release, crash, reap, ...        order        ClaimOrder
completion   succeed, fail, cancelled,        events       add_event, record_metrics, list_events
             cancel                           checkpoints  record_checkpoint, forget_..., list_checkpoints
control      pause, resume, start,            workers      register_worker, heartbeat_worker, list_workers, ...
             set_priority, expire_deadlines

Every function takes a Session first and never commits: the caller's ``with database.write()`` does. What a worker
writes is conditional on its Claim; the answer None or False means that the lease is lost.
"""

from service.jobs.checkpoints import (
    forget_checkpoints,
    forget_missing,
    list_checkpoints,
    newest_checkpoint,
    record_checkpoint,
)
from service.jobs.completion import cancel, cancelled, fail, succeed
from service.jobs.control import expire_deadlines, pause, resume, set_priority, start, timeout_error
from service.jobs.events import add_event, list_events, record_metrics
from service.jobs.leases import Renewal, claim, crash, note_resume, reap, release, renew, wanted_stop
from service.jobs.order import ClaimOrder
from service.jobs.pages import Page
from service.jobs.queries import get_job, list_attempts, list_jobs
from service.jobs.submission import NewJob, forget_old_keys, submit, submit_once
from service.jobs.transitions import Claim
from service.jobs.waiting import Places, QueuePosition, queue_position, requeue_silent
from service.jobs.workers import (
    forget_dead_workers,
    forget_worker,
    heartbeat_worker,
    list_workers,
    register_worker,
)

__all__ = [
    "Claim",
    "ClaimOrder",
    "NewJob",
    "Page",
    "Places",
    "QueuePosition",
    "Renewal",
    "add_event",
    "cancel",
    "cancelled",
    "claim",
    "crash",
    "expire_deadlines",
    "fail",
    "forget_checkpoints",
    "forget_dead_workers",
    "forget_missing",
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
    "pause",
    "queue_position",
    "reap",
    "record_checkpoint",
    "record_metrics",
    "register_worker",
    "release",
    "renew",
    "requeue_silent",
    "resume",
    "set_priority",
    "start",
    "submit",
    "submit_once",
    "succeed",
    "timeout_error",
    "wanted_stop",
]
