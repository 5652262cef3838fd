"""The Celery worker: a wake-up makes it claim jobs and supervise them, one at a time, until none is eligible.

    REMAP_SIGTERM=SIGQUIT celery -A worker.app worker -P prefork -c 1 -Q gpu --without-mingle --without-gossip

A message carries no state: duplicated, late and lost ones are harmless. Training never happens in this process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType
from typing import Any

import structlog
from celery import Task, signals
from sqlalchemy.exc import InterfaceError, OperationalError

from service import logs, tracing
from service.jobs import store
from service.jobs.database import Database, open_database
from service.jobs.phases import Queue
from service.jobs.queue import WAKE, app, prepare_broker
from service.settings import Settings, get_settings
from worker import lifeline
from worker.inventory import GpuLostError, processes_on, visible_gpus
from worker.presence import Presence, worker_id
from worker.strays import clear_strays
from worker.supervise import Attempt, StopFlag

__all__ = ["app"]
log = structlog.get_logger(__name__)
_presence: list[Presence] = []
_stop = StopFlag()
"""Of this pool child; it takes no job any more once it is set."""
# How long Celery waits for the result of a pool child that died, taking no other message meanwhile (default 10 s). No
# result is wanted: the job's row says what became of it.
app.conf.worker_lost_wait = 1.0


@app.task(name=WAKE, bind=True)
def wake(task: Task) -> None:
    """Claim, run, record, until nothing is eligible or the worker is asked to stop."""
    if _stop.is_set:  # a message that was waiting behind the one during which we were asked to stop
        return
    settings = get_settings()
    queue = Queue(task.request.delivery_info["routing_key"])
    database = open_database(settings)
    try:
        with _stop_on_signals():
            while not _stop.is_set and run_next(database, settings, queue, _stop):
                pass
    except (OperationalError, InterfaceError) as error:
        # The janitor publishes another wake-up for what still waits.
        log.warning("the database is out of reach: going back to sleep", error=str(error.orig))
    except GpuLostError as error:
        log.error("no job is taken", error=error.message)
    finally:
        database.close()
    if _stop.is_set:
        raise SystemExit(0)  # Celery starts a new pool child, unless the whole worker is shutting down


def run_next(database: Database, settings: Settings, queue: Queue, stop: StopFlag) -> bool:
    """Claim the best eligible job and see it through; returns whether there was one."""
    gpus = visible_gpus() if queue is Queue.GPU else []
    if gpus:
        clear_strays(lambda: processes_on(gpus), settings.runs_dir, settings.lease_seconds, lambda: stop.is_set)
        if stop.is_set:
            return False
    identity = worker_id(queue, os.getppid())
    device = ", ".join(gpu.name for gpu in gpus) or "cpu"
    with database.write() as session:
        claim = store.claim(session, queue, identity, device, settings.lease_seconds)
    if claim is None:
        return False
    ids = {"job_id": claim.job_id, "attempt": claim.attempt}
    request_id = claim.origin.get("request_id")
    with (
        structlog.contextvars.bound_contextvars(**ids, request_id=request_id),
        tracing.attempt_span(claim.origin, **ids, kind=claim.kind, worker=identity) as span,
    ):
        outcome = Attempt(database, settings, claim, num_gpus=len(gpus), stop=stop).run()
        span.set_attribute("vlm_dft.outcome", outcome)
        log.info("attempt ended", outcome=outcome)
    tracing.flush()
    return True


@contextmanager
def _stop_on_signals() -> Iterator[None]:
    """Let a shutdown raise the stop flag, in place of the SystemExit that Celery would raise at any bytecode.

    A cold shutdown sends SIGQUIT to the pool child; a system that ends a whole group of processes sends SIGTERM.
    Returning with the job released is all that Celery waits for.
    """

    def ask(_signum: int, _frame: FrameType | None) -> None:
        _stop.is_set = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGQUIT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


@signals.setup_logging.connect
def _set_up_logging(**_: Any) -> None:
    logs.configure()


@signals.worker_init.connect
def _prepare(**_: Any) -> None:
    prepare_broker(get_settings())
    if get_settings().storage_url is not None and find_spec("s3fs") is None:
        raise SystemExit("VLM_DFT_STORAGE_URL needs s3fs: install vlm-dft[s3]")
    if tracing.is_wanted() and find_spec("opentelemetry.sdk") is None:
        raise SystemExit("OTEL_EXPORTER_OTLP_ENDPOINT needs OpenTelemetry's SDK: install vlm-dft[otel], or unset it")
    if os.environ.get("REMAP_SIGTERM") != "SIGQUIT":
        # Celery logs and forgets any other exception of a signal's receiver.
        raise SystemExit(
            "REMAP_SIGTERM is not SIGQUIT: without it a SIGTERM waits for the training to end, and the host kills "
            "it instead of letting it write its checkpoint. Start workers with REMAP_SIGTERM=SIGQUIT"
        )
    lifeline.hold()


@signals.worker_process_init.connect
def _follow_main(**_: Any) -> None:
    lifeline.follow()
    tracing.configure("worker")


@signals.worker_ready.connect
def _appear(sender: Any, **_: Any) -> None:
    for queue in sender.app.amqp.queues.consume_from:
        _presence.append(Presence(get_settings(), Queue(queue)))
        _presence[-1].start()


@signals.worker_shutdown.connect
def _leave(**_: Any) -> None:
    while _presence:
        _presence.pop().stop()
