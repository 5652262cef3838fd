"""What Prometheus reads, computed from the database at each scrape: no process has to be alive for the numbers to hold.

Counts come from indexes and small tables, so that a scrape costs little however many jobs there have been. Nothing here
names a project, a job or a file: whoever may scrape learns totals.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.jobs.database import now
from service.jobs.phases import Kind, Phase, Queue
from service.jobs.tables import Attempt, Job, Outbox, Worker
from service.jobs.waiting import is_waiting
from service.jobs.webhook_tables import WebhookDelivery
from service.settings import Settings

_GIB = 2**30
_LOST = re.compile(r"worker .* did not renew its lease")
_CRASHED = re.compile(r"the trainer (exited|ended)|the trainer could not be started")
_CODE = re.compile(r"([a-z][a-z_]{1,39})(: .*)?", re.DOTALL)


def collect(s: Session, settings: Settings) -> Iterator[Metric]:
    """Every metric; each is there even when it has nothing to count."""
    time = now(s)
    yield from _jobs(s)
    yield from _queues(s, time)
    yield from _leases(s, time, settings)
    yield from _attempts(s)
    yield from _outboxes(s, time)
    yield from _workers(s, time, settings)


def _jobs(s: Session) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("vlm_dft_jobs", "Jobs by kind and phase.", labels=["kind", "phase"])
    counted = select(Job.kind, Job.phase, func.count(), func.sum(Job.trained_tokens)).group_by(Job.kind, Job.phase)
    rows = {(kind, phase): (number, tokens or 0) for kind, phase, number, tokens in s.execute(counted).all()}
    for kind in Kind:
        for phase in Phase:
            jobs.add_metric([kind, phase], rows.get((kind, phase), (0, 0))[0])
    yield jobs
    trained = CounterMetricFamily("vlm_dft_trained_tokens", "Supervised tokens of trainings that have succeeded.")
    trained.add_metric([], float(sum(tokens for _, tokens in rows.values())))
    yield trained


def _queues(s: Session, time: float) -> Iterator[Metric]:
    waiting = GaugeMetricFamily("vlm_dft_queue_jobs", "Jobs that wait for a worker.", labels=["queue"])
    age = GaugeMetricFamily(
        "vlm_dft_queue_oldest_age_seconds", "Age of the job that has waited longest.", labels=["queue"]
    )
    found = select(Job.queue, func.count(), func.min(Job.queued_at)).where(is_waiting).group_by(Job.queue)
    rows = {queue: (number, oldest) for queue, number, oldest in s.execute(found).all()}
    for queue in Queue:
        number, oldest = rows.get(queue, (0, time))
        waiting.add_metric([queue], number)
        age.add_metric([queue], max(0.0, time - oldest))
    yield waiting
    yield age


def _leases(s: Session, time: float, settings: Settings) -> Iterator[Metric]:
    """Of the jobs that run now, which are as few as there are workers: their documents may be read."""
    held = select(Job.kind, Job.queue, Job.lease_until, Job.progress).where(Job.lease_until.is_not(None))
    rows = s.execute(held).all()
    leases = GaugeMetricFamily("vlm_dft_leases", "Jobs that a worker holds.", labels=["queue"])
    age = GaugeMetricFamily(
        "vlm_dft_lease_oldest_age_seconds", "Time since the renewal that is longest ago.", labels=["queue"]
    )
    for queue in Queue:
        mine = [row for row in rows if row.queue == queue]
        leases.add_metric([queue], len(mine))
        ages = [time - (row.lease_until - settings.lease_seconds) for row in mine]
        age.add_metric([queue], max(0.0, *ages) if ages else 0.0)
    yield leases
    yield age
    speed = GaugeMetricFamily(
        "vlm_dft_tokens_per_second", "Input tokens per second of all running jobs.", labels=["kind"]
    )
    for kind in Kind:
        rates = [(row.progress or {}).get("tokens_per_second") or 0.0 for row in rows if row.kind == kind]
        speed.add_metric([kind], sum(rates))
    yield speed


def exit_class(reason: str | None) -> str:
    """What kind of end an attempt had: the exit reason without what is particular to it."""
    if reason is None:
        return "running"
    if _LOST.match(reason):
        return "lease_expired"
    if _CRASHED.match(reason):
        return "trainer_crashed"
    if code := _CODE.fullmatch(reason):
        return code[1]
    return "given_back"


def _attempts(s: Session) -> Iterator[Metric]:
    counts: dict[str, int] = defaultdict(int)
    by_reason = select(Attempt.exit_reason, func.count()).where(Attempt.ended_at.is_not(None))
    for reason, number in s.execute(by_reason.group_by(Attempt.exit_reason)).all():
        counts[exit_class(reason)] += number
    attempts = CounterMetricFamily("vlm_dft_attempts", "Attempts that have ended, by reason.", labels=["exit_reason"])
    for reason in sorted({*counts, "succeeded", "cancelled", "lease_expired", "trainer_crashed", "given_back"}):
        attempts.add_metric([reason], counts[reason])
    yield attempts
    reaped = CounterMetricFamily("vlm_dft_leases_reaped", "Jobs that were taken from a worker that fell silent.")
    reaped.add_metric([], counts["lease_expired"])
    yield reaped


def _outboxes(s: Session, time: float) -> Iterator[Metric]:
    boxes = {
        "vlm_dft_outbox_wakeups": ("Wake-ups still to be published", select(func.count(), func.min(Outbox.created_at))),
        "vlm_dft_webhook_deliveries": (
            "Webhook deliveries still to be made",
            select(func.count(), func.min(WebhookDelivery.next_attempt_at)).where(
                WebhookDelivery.next_attempt_at.is_not(None)
            ),
        ),
    }
    for name, (what, statement) in boxes.items():
        row: Any = s.execute(statement).one()
        number, oldest = row
        yield GaugeMetricFamily(f"{name}_pending", f"{what}.", value=number)
        age = max(0.0, time - oldest) if oldest is not None else 0.0
        yield GaugeMetricFamily(f"{name}_overdue_seconds", f"{what}: how late the first one is.", value=age)


def _workers(s: Session, time: float, settings: Settings) -> Iterator[Metric]:
    seen = s.scalars(select(Worker).order_by(Worker.last_seen)).all()
    alive = [worker for worker in seen if time - worker.last_seen < settings.lease_seconds]
    workers = GaugeMetricFamily(
        "vlm_dft_workers", "Workers heard of within a lease, or not.", labels=["queue", "state"]
    )
    for queue in Queue:
        of_queue = [worker for worker in seen if worker.queue == queue]
        living = [worker for worker in alive if worker.queue == queue]
        workers.add_metric([queue, "alive"], len(living))
        workers.add_metric([queue, "silent"], len(of_queue) - len(living))
    yield workers
    # Workers that share a GPU tell of the same one; the newest word counts.
    gpus = {(worker.host, gpu["uuid"]): gpu for worker in alive for gpu in worker.devices}
    yield from _gpus(gpus)


def _gpus(gpus: dict[tuple[str, str], dict[str, Any]]) -> Iterator[Metric]:
    labels = ["host", "gpu", "name"]
    columns = {
        "memory_used_bytes": ("Memory in use.", "memory_used_gib", _GIB),
        "memory_total_bytes": ("Memory of the device.", "memory_total_gib", _GIB),
        "utilisation_ratio": ("Share of the time with a kernel running, 0 to 1.", "utilisation_percent", 0.01),
        "temperature_celsius": ("Temperature.", "temperature_celsius", 1),
    }
    for name, (words, field, factor) in columns.items():
        family = GaugeMetricFamily(f"vlm_dft_gpu_{name}", f"GPUs: {words}", labels=labels)
        for (host, _), gpu in sorted(gpus.items()):
            if gpu.get(field) is not None:  # not every device has every sensor
                family.add_metric([host, str(gpu["index"]), gpu["name"]], gpu[field] * factor)
        yield family
