"""A service that has lived: rows for tests of what operators see."""

from __future__ import annotations

from sqlalchemy import update
from store_samples import CRASHED, expire_lease, new_job, trained

from service.jobs import store
from service.jobs.database import Database
from service.jobs.phases import Queue
from service.jobs.tables import Job
from service.settings import Settings

GPU = {"index": 0, "uuid": "GPU-1", "name": "H100", "memory_total_gib": 80.0, "memory_used_gib": 20.0}
SENSORS = {"utilisation_percent": 50, "temperature_celsius": None}


def some_history(database: Database) -> None:
    """One job waits, one runs, two have ended, one was taken from a worker that fell silent."""
    with database.write() as s:
        for ending in ("succeeded", "failed", "lost", "running"):
            job_id = store.submit(s, new_job()).id
            claim = store.claim(s, Queue.GPU, "host:gpu:1", "cuda:0", 60.0)
            assert claim is not None
            if ending == "succeeded":
                store.succeed(s, claim, trained(trained_tokens=1234))
            elif ending == "failed":
                store.fail(s, claim, CRASHED.model_copy(update={"code": "gpu_oom"}), None)
            elif ending == "lost":
                expire_lease(s, job_id)
                store.reap(s, Settings())
                s.execute(update(Job).where(Job.id == job_id).values(queued_at=Job.queued_at - 100, priority=-9))
            else:
                progress = {"phase": "running", "tokens_per_second": 1000.0}
                s.execute(update(Job).where(Job.id == claim.job_id).values(progress=progress))
        store.register_worker(
            s, "host:gpu:1", host="host", queue=Queue.GPU, pid=1, devices=[GPU | SENSORS], versions={}
        )
