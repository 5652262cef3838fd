"""What an estimate takes from the database: devices that are there, how fast finished jobs were, how long the queue is.

Reads rows; changes nothing. Knows nothing about tokens or memory.
"""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.jobs.database import now
from service.jobs.order import is_waiting
from service.jobs.phases import ACTIVE, Kind, Phase, Queue
from service.jobs.tables import Job, Worker
from vlm_dft.config import TrainConfig
from vlm_dft.estimate_report import DeviceFit, QueueEstimate, TimeEstimate

_FINISHED_JOBS: Final = 20
"""The newest ones that are looked at."""
_CPU: Final = "cpu"


def alive_workers(s: Session, alive_seconds: float) -> list[Worker]:
    """Those of the GPU queue, which trains; on a machine without a GPU they have no device."""
    statement = select(Worker).where(Worker.queue == Queue.GPU, Worker.last_seen > now(s) - alive_seconds)
    return list(s.scalars(statement.order_by(Worker.id)))


def on_gpu(workers: list[Worker]) -> bool:
    """Whether any of them has one; without workers a GPU is assumed."""
    return not workers or any(worker.devices for worker in workers)


def device_fits(workers: list[Worker], needed_gib: float | None) -> tuple[DeviceFit, ...]:
    """Each kind of device once. A job takes all devices of a worker, each of which holds the whole model."""
    kinds = Counter(
        (device.get("name", "?"), device.get("memory_total_gib"))
        for worker in workers
        for device in (worker.devices or [{"name": _CPU}])
    )
    return tuple(
        DeviceFit(
            name=name,
            count=count,
            memory_total_gib=total,
            fits=None if total is None or needed_gib is None else needed_gib <= total,
        )
        for (name, total), count in kinds.items()
    )


def time_estimate(s: Session, project: str, model: str, train: TrainConfig, input_tokens: int) -> TimeEstimate:
    """From the project's finished jobs of the same model that trained the same parameters."""
    statement = (
        select(Job)
        .where(Job.project == project, Job.kind == Kind.FINE_TUNING, Job.phase == Phase.SUCCEEDED, Job.model == model)
        .order_by(Job.finished_at.desc())
        .limit(_FINISHED_JOBS)
    )
    speeds: dict[str, list[float]] = {}
    for job in s.scalars(statement):
        trained = (job.result or {}).get("train") or {}
        whole = trained.get("wall_seconds") and trained.get("input_tokens") and trained["resumed_from_step"] is None
        if whole and _same_work(job.config["train"], train):
            speed = trained["input_tokens"] / trained["wall_seconds"]
            speeds.setdefault(trained["device"], []).append(speed)
    if not speeds:
        basis = f"unknown: no finished job of this project trained {model} with this adapter and freezing"
        return TimeEstimate(seconds=None, tokens_per_second=None, num_jobs=0, basis=basis)
    device, measured = max(speeds.items(), key=lambda entry: len(entry[1]))
    speed = median(measured)
    return TimeEstimate(
        seconds=input_tokens / speed,
        tokens_per_second=speed,
        num_jobs=len(measured),
        basis=f"median of {len(measured)} finished jobs of {model} on {device}, validation and checkpoints included, "
        "loading and evaluation not",
    )


def _same_work(theirs: dict[str, object], ours: TrainConfig) -> bool:
    """Settings that decide how much is computed per token."""
    mine = ours.model_dump(mode="json", include={"adapter", "freeze", "gradient_checkpointing", "packing"})
    return all(theirs.get(name) == value for name, value in mine.items())


def queue_estimate(s: Session, workers: list[Worker], priority: int) -> QueueEstimate:
    """As if the job were submitted now; fairness between projects may let it start earlier."""
    ahead = s.scalar(
        select(func.count()).select_from(Job).where(Job.queue == Queue.GPU, is_waiting, Job.priority >= priority)
    )
    ahead = ahead or 0
    running = list(s.scalars(select(Job).where(Job.queue == Queue.GPU, Job.phase.in_(ACTIVE))))
    if not workers:
        return QueueEstimate(seconds=None, jobs_ahead=ahead, workers=0, basis="unknown: no worker is alive")
    if ahead + len(running) < len(workers):
        return QueueEstimate(seconds=0.0, jobs_ahead=ahead, workers=len(workers), basis="a worker is idle")
    if ahead:
        basis = "unknown: jobs ahead have not begun, and nothing says how long they will take"
        return QueueEstimate(seconds=None, jobs_ahead=ahead, workers=len(workers), basis=basis)
    remaining = [(job.progress or {}).get("seconds_remaining") for job in running]
    known = [seconds for seconds in remaining if seconds is not None]
    if not known:
        basis = "unknown: no running job has said yet how long it will take"
        return QueueEstimate(seconds=None, jobs_ahead=0, workers=len(workers), basis=basis)
    basis = "the running job that says it will end first"
    return QueueEstimate(seconds=min(known), jobs_ahead=0, workers=len(workers), basis=basis)
