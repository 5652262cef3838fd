"""A storm: jobs come in, things die at random, and at the end every promise is checked.

Seeded: what it draws is repeatable; what the machine was doing at that moment is not.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from chaos_service import LEASE_SECONDS, ChaosService
from sqlalchemy.exc import OperationalError
from throwaway import wait_until
from worker_stack import overlaps

from service.jobs import store
from service.jobs.phases import TERMINAL, Phase
from service.jobs.tables import Attempt, Checkpoint, Job, JobEvent
from vlm_dft.run_dir import CHECKPOINT_MARKER, RunDir

STEPS = 40
SETTLE_SECONDS = 240.0


@dataclass
class Submission:
    """What the user wanted: one job for one key."""

    key: str
    body: dict[str, Any]
    job_id: str | None = None
    cancelled: bool = False


@dataclass
class Report:
    """What happened."""

    kind: str
    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    jobs: int = 0
    attempts: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    overlapping_steps: int = 0
    broken: list[str] = field(default_factory=list)
    """Every promise that was not kept, in words."""

    @property
    def num_faults(self) -> int:
        return self.faults.total()


class Storm:
    """Faults at random moments, and a user at work meanwhile."""

    def __init__(
        self,
        service: ChaosService,
        seed: int,
        file_id: str,
        *,
        jobs_at_once: int = 4,
        pause_seconds: tuple[float, float] = (0.1, 0.9),
    ) -> None:
        """pause_seconds: between two faults."""
        self.pause_seconds = pause_seconds
        self.service, self.file_id, self.jobs_at_once = service, file_id, jobs_at_once
        self.random = random.Random(seed)
        self.submissions: list[Submission] = []
        self.report = Report(service.kind, seed)
        self._client = service.client()
        self._faults: list[Callable[[], bool]] = [
            self.kill_api,
            self.kill_janitor,
            self.kill_worker,
            self.kill_supervisor,
            self.kill_trainer,
            self.kill_trainer,
            self.stop_supervisor,
            self.drain_worker,
        ]
        if service.redis is not None:
            self._faults += [self.kill_broker, self.wipe_broker]
        if service.postgres is not None:
            self._faults += [self.crash_postgres]

    def rage(self, seconds: float) -> None:
        """Fault upon fault, with the user submitting, cancelling and pausing in between."""
        end, next_fault = time.monotonic() + seconds, 0.0
        while (now := time.monotonic()) < end:
            self.service.tend(self.random)
            self._use()
            if now >= next_fault:
                fault = self.random.choice(self._faults)
                if fault():
                    self.report.faults[fault.__name__] += 1
                    next_fault = now + self.random.uniform(*self.pause_seconds)
            time.sleep(0.1)

    def settle(self) -> Report:
        """No more faults: wait for every job's end, and look at everything."""

        def all_ended() -> bool:
            self.service.tend()
            self._use(more=False)
            known = self._jobs()  # none while the database is away
            jobs = [known.get(each.job_id or "") for each in self.submissions]
            return all(job is not None and job.phase in TERMINAL for job in jobs)

        with suppress(AssertionError):  # what did not end is lost, and reported as such
            wait_until(all_ended, SETTLE_SECONDS, "every job ends")
        self._look()
        return self.report

    def close(self) -> None:
        """The user goes home."""
        self._client.close()

    # The user

    def _use(self, more: bool = True) -> None:
        waiting = [each for each in self.submissions if each.job_id is None]
        unfinished = len(waiting) + len(self._unfinished())
        if more and unfinished < self.jobs_at_once:
            supervised = {"hyperparameters": {"max_steps": STEPS, "checkpoint_every_steps": 5, "batch_size": 2}}
            body = {
                "model": "tiny",
                "training_file": self.file_id,
                "seed": 1,
                "method": {"type": "supervised", "supervised": supervised},
            }
            self.submissions.append(Submission(str(uuid.UUID(int=self.random.getrandbits(128))), body))
        for each in waiting:
            self._submit(each)
        draw = self.random.random()
        if more and draw < 0.03 and (running := self._unfinished()):
            self._ask(self.random.choice(running), "cancel" if draw < 0.01 else "pause")
        for job in self._jobs().values():
            if job.phase in (Phase.PAUSED, Phase.PAUSING) and self.random.random() < 0.1:
                self._ask(job.id, "resume")

    def _submit(self, each: Submission) -> None:
        """As a user with a retry loop: the same key until there is an answer."""
        with suppress(openai.APIConnectionError, openai.InternalServerError):
            headers = {"Idempotency-Key": each.key}
            each.job_id = self._client.fine_tuning.jobs.create(**each.body, extra_headers=headers).id

    def _ask(self, job_id: str, what: str) -> None:
        if what == "cancel":  # before the answer, which may be lost with the API
            next(each for each in self.submissions if each.job_id == job_id).cancelled = True
        with suppress(openai.APIConnectionError, openai.InternalServerError, openai.BadRequestError):
            self._client.post(f"/fine_tuning/jobs/{job_id}/{what}", cast_to=object)

    def _jobs(self) -> dict[str, Job]:
        known = [each.job_id for each in self.submissions if each.job_id]
        try:
            with self.service.database.read() as s:
                return {job_id: s.get_one(Job, job_id) for job_id in known}
        except OperationalError:
            return {}  # the database is being restarted

    def _unfinished(self) -> list[str]:
        return [job_id for job_id, job in self._jobs().items() if job.phase not in TERMINAL]

    # Faults: each answers whether there was something to hit

    def _hit(self, pids: list[int | None], number: signal.Signals = signal.SIGKILL) -> bool:
        alive = [pid for pid in pids if pid is not None]
        if not alive:
            return False
        with suppress(ProcessLookupError):
            os.kill(self.random.choice(alive), number)
            return True
        return False

    def kill_api(self) -> bool:
        return self._hit([self.service.pid("api")])

    def kill_janitor(self) -> bool:
        return self._hit([self.service.pid("janitor")])

    def _workers(self) -> list[int | None]:
        return [self.service.pid(f"gpu-worker-{index}") for index in (0, 1)]

    def kill_worker(self) -> bool:
        return self._hit(self._workers())

    def drain_worker(self) -> bool:
        return self._hit(self._workers(), signal.SIGTERM)

    def kill_supervisor(self) -> bool:
        return self._hit([*self.service.supervisors()])

    def kill_trainer(self) -> bool:
        return self._hit([*self.service.trainers()])

    def stop_supervisor(self) -> bool:
        """For longer than a lease: when it wakes, somebody else has its job."""
        found = self.service.supervisors()
        if not found:
            return False
        self.service.stop_for(self.random.choice(found), 2 * LEASE_SECONDS)
        return True

    def kill_broker(self) -> bool:
        assert self.service.redis is not None
        self.service.redis.kill()
        self.service.redis.start()
        return True

    def wipe_broker(self) -> bool:
        assert self.service.redis is not None
        self.service.redis.wipe()
        return True

    def crash_postgres(self) -> bool:
        assert self.service.postgres is not None
        self.service.postgres.crash()
        self.service.postgres.start()
        return True

    # What must hold afterwards

    def _look(self) -> None:
        report, jobs = self.report, self._jobs()
        with self.service.database.read() as s:
            stored = s.query(Job).where(Job.kind == "fine_tuning").count()
            events = {job_id: s.query(JobEvent).where(JobEvent.job_id == job_id).all() for job_id in jobs}
            attempts = {job_id: store.list_attempts(s, job_id) for job_id in jobs}
            checkpoints = s.query(Checkpoint).all()
        report.jobs = len(self.submissions)
        if stored != len(self.submissions):
            report.broken.append(f"{len(self.submissions)} keys made {stored} jobs")
        for each in self.submissions:
            job = jobs.get(each.job_id or "")
            if job is None or job.phase not in TERMINAL:
                report.lost.append(f"{each.job_id}: {job.phase if job else 'never accepted'}")
                continue
            report.ended[job.phase] += 1
            self._look_at(each, job, sorted(events[job.id], key=lambda event: event.seq), attempts[job.id])
        trained = [job.result["train"] for job in jobs.values() if job.phase == Phase.SUCCEEDED and job.result]
        if len({train["model_sha256"] for train in trained}) > 1:
            report.broken.append("the same request gave several models")
        for checkpoint in checkpoints:
            if not (Path(checkpoint.path) / CHECKPOINT_MARKER).is_file():
                report.broken.append(f"{checkpoint.name}: the checkpoint is not complete")

    def _look_at(self, each: Submission, job: Job, events: list[JobEvent], attempts: list[Attempt]) -> None:
        report = self.report
        report.attempts += len(attempts)
        if job.phase != Phase.SUCCEEDED and not (each.cancelled and job.phase == Phase.CANCELLED):
            report.broken.append(f"{job.id} ended {job.phase}: {job.error}")
        if [event.seq for event in events] != list(range(1, len(events) + 1)):
            report.broken.append(f"{job.id}: its events have a gap")
        told = [
            event.data["step"] for event in events if event.type == "metrics" and event.data and "nll" in event.data
        ]
        if told != sorted(set(told)) or (job.phase == Phase.SUCCEEDED and told != list(range(1, STEPS + 1))):
            report.broken.append(f"{job.id}: its steps were told as {told}")
        if sorted(attempt.fence for attempt in attempts) != [attempt.fence for attempt in attempts]:
            report.broken.append(f"{job.id}: fences fell")
        if open_ := [attempt.attempt for attempt in attempts if attempt.ended_at is None]:
            report.broken.append(f"{job.id}: attempts {open_} have no end")
        path = self.service.settings.runs_dir / job.id
        report.overlapping_steps += overlaps(_journal(path)) + _overlapping_metrics(attempts)


def _journal(job_path: Path) -> list[dict[str, Any]]:
    """The step trainer's; the real one keeps none."""
    file = job_path / "journal.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _overlapping_metrics(attempts: list[Attempt]) -> int:
    """Steps that an attempt wrote after the next one had written its first: two executions at once."""
    lines = [RunDir(Path(attempt.run_path)).read_metrics() for attempt in attempts]
    count = 0
    for index, written in enumerate(lines):
        later = [line["time"] for others in lines[index + 1 :] for line in others if line["time"] > 1e9]
        count += sum(line["time"] > min(later) for line in written) if later else 0
    return count
