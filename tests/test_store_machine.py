"""Random histories of the store against a model of what a job may go through, on SQLite and PostgreSQL.

Invariants: at most one live fence per job, no illegal transition, nothing moved by a claim that is over, gapless
events, and no lost job: at the end everything that was submitted can still be brought to its end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import func, select
from store_samples import CRASHED, NAN, expire_lease, new_job, trained

from service.jobs import store, submission
from service.jobs.database import Database
from service.jobs.phases import ACTIVE, TERMINAL, WAITING, Phase, Queue, Stop, may_follow
from service.jobs.tables import Attempt, Base, Job, JobEvent, Model, Outbox
from service.settings import Settings
from vlm_dft.results import Progress

MAX_CRASHES = 3
MAX_JOBS = 3
"""Jobs that have not ended: few, so that each goes through much."""
ENDINGS = ("crash", "release", "cancelled", "fail", "succeed")
SETTINGS = Settings(max_crashes=MAX_CRASHES)


@dataclass
class Known:
    """What the model knows of one job."""

    project: str
    phase: Phase = Phase.QUEUED
    crashes: int = 0
    expired: bool = False
    claims: list[store.Claim] = field(default_factory=list)

    @property
    def live(self) -> store.Claim | None:
        return self.claims[-1] if self.phase in ACTIVE else None


class StoreMachine(RuleBasedStateMachine):
    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[str, Known] = {}
        self.keys: dict[str, str] = {}
        self.wake_ups = 0
        self.seen: dict[str, tuple[Phase, int]] = {}

    @initialize()
    def start_empty(self) -> None:
        with self.database.write() as s:
            for table in reversed(Base.metadata.sorted_tables):
                s.execute(table.delete())

    @precondition(lambda self: sum(job.phase not in TERMINAL for job in self.jobs.values()) < MAX_JOBS)
    @rule(project=st.sampled_from("ab"), priority=st.integers(0, 1))
    def submit(self, project: str, priority: int) -> None:
        with self.database.write() as s:
            job = store.submit(s, new_job(project, priority=priority))
        self.jobs[job.id] = Known(project)
        self.wake_ups += 1

    @rule(key=st.sampled_from(["k1", "k2"]))
    def submit_by_key(self, key: str) -> None:
        with self.database.write() as s:
            job = store.submit_once(s, "a", key, "body", lambda: new_job("a"))
        self.wake_ups += key not in self.keys
        assert self.keys.setdefault(key, job.id) == job.id
        self.jobs.setdefault(job.id, Known("a"))

    @rule(worker=st.sampled_from(["w1", "w2", "w3"]))
    def claim(self, worker: str) -> None:
        self.claim_next(worker)

    def claim_next(self, worker: str) -> str | None:
        waiting = {job_id for job_id, job in self.jobs.items() if job.phase in WAITING}
        with self.database.write() as s:
            first = {j for j in waiting if (p := store.queue_position(s, s.get_one(Job, j))) and p.position == 1}
            taken = store.claim(s, Queue.GPU, worker, "cpu", 60)
        assert first == ({taken.job_id} if taken else set())
        if taken is None:
            return None
        job = self.jobs[taken.job_id]
        assert all(taken.fence > old.fence for old in job.claims)
        job.claims.append(taken)
        job.phase, job.expired = Phase.STARTING, False
        assert taken.attempt == len(job.claims)
        return taken.job_id

    @precondition(lambda self: self.live_claims())
    @rule(data=st.data(), what=st.sampled_from(["renew", *ENDINGS]))
    def worker_writes(self, data: st.DataObject, what: str) -> None:
        self.write(data.draw(st.sampled_from(self.live_claims())), what)

    @precondition(lambda self: self.late_claims())
    @rule(data=st.data())
    def late_worker_writes(self, data: st.DataObject) -> None:
        """A worker that was thought dead tries everything."""
        claim = data.draw(st.sampled_from(self.late_claims()))
        for what in ("renew", *ENDINGS):
            self.write(claim, what)

    def live_claims(self) -> list[store.Claim]:
        return [job.live for job in self.jobs.values() if job.live]

    def late_claims(self) -> list[store.Claim]:
        return [claim for job in self.jobs.values() for claim in job.claims if claim is not job.live]

    def write(self, claim: store.Claim, what: str) -> None:
        job = self.jobs[claim.job_id]
        live = job.live is not None and job.live.fence == claim.fence
        cancelling = job.phase is Phase.CANCELLING
        with self.database.write() as s:
            if what == "renew":
                renewal = store.renew(s, claim, 60, Progress(phase="running", step=1))
                assert renewal == (store.Renewal(Stop.CANCEL if cancelling else None) if live else None)
                after = Phase.CANCELLING if cancelling else Phase.RUNNING
            elif what == "succeed":
                assert store.succeed(s, claim, trained()) == live
                after = Phase.SUCCEEDED
            elif what == "fail":
                assert store.fail(s, claim, NAN, None) == live
                after = Phase.FAILED
            elif what == "cancelled":
                assert store.cancelled(s, claim) == live
                after = Phase.CANCELLED
            elif what == "release":
                assert store.release(s, claim, "drain") == live
                after = Phase.CANCELLED if cancelling else Phase.QUEUED
            else:
                after = self.lost(job)
                crashed = store.crash(s, claim, "exit code 1", CRASHED, max_crashes=MAX_CRASHES)
                assert crashed == (after if live else None)
                job.crashes += live
        if live:
            self.wake_ups += after in WAITING
            job.phase = after
            job.expired &= what != "renew"

    @staticmethod
    def lost(job: Known) -> Phase:
        """Where a job goes whose attempt is lost now."""
        if job.phase is Phase.CANCELLING:
            return Phase.CANCELLED
        return Phase.RECOVERING if job.crashes + 1 < MAX_CRASHES else Phase.FAILED

    @precondition(lambda self: any(job.phase in ACTIVE for job in self.jobs.values()))
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(j for j, job in self.jobs.items() if job.phase in ACTIVE)))
        with self.database.write() as s:
            expire_lease(s, job_id)
        self.jobs[job_id].expired = True

    @rule()
    def reap(self) -> None:
        expected = {j for j, job in self.jobs.items() if job.expired and job.phase in ACTIVE}
        with self.database.write() as s:
            assert set(store.reap(s, SETTINGS)) == expected
        for job_id in expected:
            job = self.jobs[job_id]
            self.wake_ups += self.lost(job) in WAITING
            job.phase, job.crashes, job.expired = self.lost(job), job.crashes + 1, False

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.jobs[job_id]
        if job.phase in {Phase.SUCCEEDED, Phase.FAILED}:
            return
        with self.database.write() as s:
            store.cancel(s, job.project, job_id)
        if job.phase is not Phase.CANCELLED:
            job.phase = Phase.CANCELLED if job.phase in WAITING else Phase.CANCELLING

    @invariant()
    def the_database_agrees(self) -> None:
        with self.database.read() as s:
            rows = {job.id: job for job in s.scalars(select(Job))}
            open_attempts = s.scalars(select(Attempt).where(Attempt.ended_at.is_(None))).all()
            attempts = dict(s.execute(select(Attempt.job_id, func.count()).group_by(Attempt.job_id)).all())
            events = s.execute(
                select(JobEvent.job_id, func.count(), func.min(JobEvent.seq), func.max(JobEvent.seq)).group_by(
                    JobEvent.job_id
                )
            ).all()
            models = set(s.scalars(select(Model.job_id)))
            wake_ups = s.scalars(select(func.count()).select_from(Outbox)).one()
        assert rows.keys() == self.jobs.keys()
        for job_id, row in rows.items():
            job = self.jobs[job_id]
            assert (row.phase, row.crashes, row.attempt) == (job.phase, job.crashes, len(job.claims))
            assert (row.owner is not None) == (row.lease_until is not None) == (job.phase in ACTIVE)
            assert (row.finished_at is not None) == (job.phase in TERMINAL)
            assert job.live is None or row.fence == job.live.fence
            before, fence = self.seen.get(job_id, (Phase(row.phase), row.fence))
            assert before == row.phase or may_follow(before, Phase(row.phase)), (before, row.phase)
            assert row.fence >= fence
            self.seen[job_id] = (Phase(row.phase), row.fence)
        live = {(job_id, len(job.claims)) for job_id, job in self.jobs.items() if job.phase in ACTIVE}
        assert {(a.job_id, a.attempt) for a in open_attempts} == live
        assert attempts == {job_id: len(job.claims) for job_id, job in self.jobs.items() if job.claims}
        assert {e[0] for e in events} == rows.keys()
        assert all(count == last and first == 1 for _, count, first, last in events)
        assert models == {job_id for job_id, job in self.jobs.items() if job.phase is Phase.SUCCEEDED}
        assert wake_ups == self.wake_ups  # one whenever a job begins to wait; nothing publishes here

    def teardown(self) -> None:
        """No job is lost: whatever happened, workers can bring every job to an end."""
        for job_id, job in self.jobs.items():
            if job.phase in ACTIVE:
                with self.database.write() as s:
                    expire_lease(s, job_id)
                job.expired = True
        self.reap()
        while (job_id := self.claim_next("w1")) is not None:
            self.write(self.jobs[job_id].claims[-1], "succeed")
        self.seen.clear()  # several transitions lie between this look and the last one
        self.the_database_agrees()
        assert all(job.phase in TERMINAL for job in self.jobs.values())


def test_no_history_breaks_the_store(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    # Random ids could decide between jobs of one moment, and then a history could not be repeated.
    numbers = count()
    monkeypatch.setattr(submission, "new_job_id", lambda _: f"ftjob-{next(numbers):024d}")

    class Machine(StoreMachine):
        pass

    Machine.database = database
    run_state_machine_as_test(
        Machine,
        settings=hypothesis.settings(
            max_examples=25,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            # No shrinking: it would take minutes of real transactions, and forty steps can be read.
            phases=[hypothesis.Phase.generate],
            suppress_health_check=[hypothesis.HealthCheck.too_slow],
        ),
    )
