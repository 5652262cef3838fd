"""Random histories of the store against a model of what a job may go through, on SQLite and PostgreSQL.

Invariants: at most one live fence per job, no illegal transition, nothing moved by a claim that is over, gapless
events, no cap exceeded, places that tell the order of claims, and no lost job: at the end everything that was submitted
can still be brought to its end. VLM_DFT_TEST_HISTORIES=300 tries so many new
ones; without it, the same 10 every time.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from unittest import mock

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
from sqlalchemy import func, select, update
from store_samples import CRASHED, NAN, expire_lease, new_job, trained

from service.errors import InvalidStateError
from service.jobs import order, store, submission
from service.jobs.caps import Caps
from service.jobs.database import Database
from service.jobs.phases import ACTIVE, HELD, STOPPING, TERMINAL, WAITING, WORKING, Phase, Queue, Stop, may_follow
from service.jobs.tables import Attempt, Base, Job, JobEvent, Model, Outbox
from service.settings import Settings
from vlm_dft.results import Progress

MAX_CRASHES = 3
MAX_JOBS = 5
"""Jobs that have not ended: few, so that each goes through much."""
ENDINGS = ("crash", "release", "cancelled", "fail", "succeed")
CAPS = {"a": Caps(project_jobs=3, key_jobs=2), "b": Caps(key_jobs=1)}
HISTORIES = os.environ.get("VLM_DFT_TEST_HISTORIES")
SETTINGS = Settings(max_crashes=MAX_CRASHES)
Plan = tuple[str, str | None, int, bool, float | None]
PLANS = st.tuples(
    st.sampled_from("ab"),
    st.sampled_from(["k", None]),
    st.integers(0, 1),
    st.sampled_from([True, True, True, False]),
    st.sampled_from([None, None, 1e4]),
)
"""Project, key, priority, whether it starts by itself, deadline in seconds."""
SKEWS_SECONDS = st.sampled_from([0.0, 1e5, -1e5])
"""How wrong a worker's own clock is: far more than a lease."""


@dataclass
class Known:
    """What the model knows of one job."""

    project: str
    key: str | None = None
    phase: Phase = Phase.QUEUED
    crashes: int = 0
    has_deadline: bool = False
    expired: bool = False
    """Its lease."""
    late: bool = False
    """Past its deadline."""
    claims: list[store.Claim] = field(default_factory=list)

    @property
    def live(self) -> store.Claim | None:
        return self.claims[-1] if self.phase in ACTIVE else None

    @property
    def stop(self) -> Stop | None:
        if self.phase is Phase.CANCELLING:
            return Stop.CANCEL
        if self.late:
            return Stop.TIMEOUT
        return Stop.PAUSE if self.phase is Phase.PAUSING else None

    @property
    def after_loss(self) -> Phase:
        """Where it goes when its attempt is lost now."""
        if self.phase is Phase.CANCELLING:
            return Phase.CANCELLED
        if self.crashes + 1 >= MAX_CRASHES:
            return Phase.FAILED
        return Phase.PAUSED if self.phase is Phase.PAUSING else Phase.RECOVERING

    @property
    def after_release(self) -> Phase:
        return {Phase.CANCELLING: Phase.CANCELLED, Phase.PAUSING: Phase.PAUSED}.get(self.phase, Phase.QUEUED)


class StoreMachine(RuleBasedStateMachine):
    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[str, Known] = {}
        self.keys: dict[str, str] = {}
        self.wake_ups = 0
        self.seen: dict[str, tuple[Phase, int]] = {}

    @initialize(plans=st.lists(PLANS, min_size=2, max_size=MAX_JOBS))
    def start_anew(self, plans: list[Plan]) -> None:
        with self.database.write() as s:
            for table in reversed(Base.metadata.sorted_tables):
                s.execute(table.delete())
        self.submit(plans)

    @precondition(lambda self: sum(job.phase not in TERMINAL for job in self.jobs.values()) < MAX_JOBS)
    @rule(plans=st.lists(PLANS, min_size=1, max_size=3))
    def submit(self, plans: list[Plan]) -> None:
        for project, key, priority, auto_start, deadline in plans:
            new = new_job(project, api_key_id=key, priority=priority, auto_start=auto_start, deadline_seconds=deadline)
            with self.database.write() as s:
                job = store.submit(s, new)
            phase = Phase.QUEUED if auto_start else Phase.CREATED
            self.jobs[job.id] = Known(project, key, phase, has_deadline=deadline is not None)
            self.wake_ups += auto_start

    @rule(key=st.sampled_from(["k1", "k2"]))
    def submit_by_key(self, key: str) -> None:
        with self.database.write() as s:
            job = store.submit_once(s, "a", key, "body", lambda: new_job("a"))
        self.wake_ups += key not in self.keys
        assert self.keys.setdefault(key, job.id) == job.id
        self.jobs.setdefault(job.id, Known("a"))

    @rule(worker=st.sampled_from(["w1", "w2", "w3"]), skew=SKEWS_SECONDS, messages=st.integers(1, 2))
    def wake_up(self, worker: str, skew: float, messages: int) -> None:
        """A message, or a message delivered twice."""
        for _ in range(messages):
            self.claim_next(worker, skew)

    def claim_next(self, worker: str, skew: float = 0.0) -> str | None:
        with self.database.write() as s, clock_off_by(skew):
            told = self.told_order(s)
            taken = store.claim(s, Queue.GPU, worker, "cpu", 60)
        assert told[:1] == ([taken.job_id] if taken else [])
        if taken is None:
            return None
        job = self.jobs[taken.job_id]
        assert all(taken.fence > old.fence for old in job.claims)
        job.claims.append(taken)
        job.phase, job.expired = Phase.STARTING, False
        assert taken.attempt == len(job.claims)
        return taken.job_id

    def told_order(self, s) -> list[str]:
        """The jobs that have a place, in the order of their places; the others say truly why they have none."""
        places = {job_id: store.queue_position(s, s.get_one(Job, job_id)) for job_id in self.jobs}
        for job_id, place in places.items():
            job = self.jobs[job_id]
            assert (place is None) == (job.phase in ACTIVE | TERMINAL)
            held = {Phase.PAUSED: {"paused"}, Phase.CREATED: {"not_started"}}.get(job.phase, {"project_cap", "key_cap"})
            assert place is None or (place.position is None) == (place.blocked_reason in held)
        placed = {job_id: place.position for job_id, place in places.items() if place and place.position}
        assert sorted(placed.values()) == list(range(1, len(placed) + 1))
        return sorted(placed, key=lambda job_id: placed[job_id])

    @rule()
    def claim_everything_and_think_better_of_it(self) -> None:
        """The places are those of the claims that follow, were no job to end; rolled back."""
        with self.database.write() as s:
            told, taken = self.told_order(s), []
            while claim := store.claim(s, Queue.GPU, "w1", "cpu", 60):
                taken.append(claim.job_id)
            assert taken == told
            s.rollback()

    @precondition(lambda self: self.live_claims())
    @rule(data=st.data(), what=st.sampled_from(["renew", *ENDINGS]), skew=SKEWS_SECONDS)
    def worker_writes(self, data: st.DataObject, what: str, skew: float) -> None:
        self.write(data.draw(st.sampled_from(self.live_claims())), what, skew)

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

    def write(self, claim: store.Claim, what: str, skew: float = 0.0) -> None:
        job = self.jobs[claim.job_id]
        live = job.live is not None and job.live.fence == claim.fence
        with self.database.write() as s, clock_off_by(skew):
            if what == "renew":
                assert store.wanted_stop(s, claim) == (job.stop if live else None)
                renewal = store.renew(s, claim, 60, Progress(phase="running", step=1))
                assert renewal == (store.Renewal(job.stop) if live else None)
                after = job.phase if job.phase in STOPPING else Phase.RUNNING
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
                after = job.after_release
            else:
                after = job.after_loss
                crashed = store.crash(s, claim, "exit code 1", CRASHED, max_crashes=MAX_CRASHES)
                assert crashed == (after if live else None)
                job.crashes += live
        if live:
            self.wake_ups += after in WAITING
            job.phase = after
            job.expired &= what != "renew"

    @precondition(lambda self: self.in_phases(ACTIVE))
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self.in_phases(ACTIVE)))
        with self.database.write() as s:
            expire_lease(s, job_id)
        self.jobs[job_id].expired = True

    @rule(skew=SKEWS_SECONDS)
    def reap(self, skew: float = 0.0) -> None:
        expected = {j for j, job in self.jobs.items() if job.expired and job.phase in ACTIVE}
        with self.database.write() as s, clock_off_by(skew):
            assert set(store.reap(s, SETTINGS)) == expected
        for job_id in expected:
            job = self.jobs[job_id]
            self.wake_ups += job.after_loss in WAITING
            job.phase, job.crashes, job.expired = job.after_loss, job.crashes + 1, False

    @precondition(lambda self: self.with_deadline())
    @rule(data=st.data())
    def pass_deadline(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self.with_deadline()))
        with self.database.write() as s:
            s.execute(update(Job).where(Job.id == job_id).values(deadline_at=Job.deadline_at - 1e6))
        self.jobs[job_id].late = True

    def with_deadline(self) -> list[str]:
        jobs = self.jobs.items()
        return sorted(j for j, job in jobs if job.has_deadline and job.phase not in TERMINAL | {Phase.CREATED})

    @rule(skew=SKEWS_SECONDS)
    def expire_deadlines(self, skew: float) -> None:
        expected = {j for j in self.in_phases(WAITING | HELD) if self.jobs[j].late}
        with self.database.write() as s, clock_off_by(skew):
            assert set(store.expire_deadlines(s)) == expected
        for job_id in expected:
            self.jobs[job_id].phase = Phase.FAILED

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), what=st.sampled_from(["cancel", "pause", "pause", "resume", "start"]))
    def owner_asks(self, data: st.DataObject, what: str) -> None:
        self.ask(data.draw(st.sampled_from(sorted(self.jobs))), what)

    def ask(self, job_id: str, what: str) -> None:
        job = self.jobs[job_id]
        after = OWNER_MOVES[what].get(job.phase)
        if after is None:
            with self.database.write() as s, pytest.raises(InvalidStateError, match=job.phase):
                getattr(store, what)(s, job.project, job_id)
            return
        with self.database.write() as s:
            getattr(store, what)(s, job.project, job_id)
        self.wake_ups += after is Phase.QUEUED and job.phase in HELD
        job.phase = after

    @precondition(lambda self: self.in_phases(frozenset(Phase) - TERMINAL))
    @rule(data=st.data(), priority=st.integers(0, 2))
    def change_priority(self, data: st.DataObject, priority: int) -> None:
        job_id = data.draw(st.sampled_from(self.in_phases(frozenset(Phase) - TERMINAL)))
        with self.database.write() as s:
            assert store.set_priority(s, self.jobs[job_id].project, job_id, priority).priority == priority

    def in_phases(self, phases: frozenset[Phase]) -> list[str]:
        return sorted(job_id for job_id, job in self.jobs.items() if job.phase in phases)

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
        running = Counter(job.project for job in self.jobs.values() if job.phase in ACTIVE)
        by_key = Counter((job.project, job.key) for job in self.jobs.values() if job.phase in ACTIVE)
        assert all(number <= (CAPS[project].project_jobs or 99) for project, number in running.items())
        assert all(number <= (CAPS[project].key_jobs or 99) for (project, _), number in by_key.items())
        live = {(job_id, len(job.claims)) for job_id, job in self.jobs.items() if job.phase in ACTIVE}
        assert {(a.job_id, a.attempt) for a in open_attempts} == live
        assert attempts == {job_id: len(job.claims) for job_id, job in self.jobs.items() if job.claims}
        assert {e[0] for e in events} == rows.keys()
        assert all(count == last and first == 1 for _, count, first, last in events)
        assert models == {job_id for job_id, job in self.jobs.items() if job.phase is Phase.SUCCEEDED}
        assert wake_ups == self.wake_ups  # one whenever a job begins to wait; nothing publishes here

    def teardown(self) -> None:
        """No job is lost: whatever happened, owners and workers can bring every job to an end."""
        for job_id in self.in_phases(ACTIVE):
            with self.database.write() as s:
                expire_lease(s, job_id)
            self.jobs[job_id].expired = True
        self.reap()
        for job_id in self.in_phases(HELD):
            self.ask(job_id, "resume" if self.jobs[job_id].phase is Phase.PAUSED else "start")
        while (job_id := self.claim_next("w1")) is not None:
            self.write(self.jobs[job_id].claims[-1], "succeed")
        self.seen.clear()  # several transitions lie between this look and the last one
        self.the_database_agrees()
        assert all(job.phase in TERMINAL for job in self.jobs.values())


OWNER_MOVES = {
    "cancel": dict.fromkeys(ACTIVE, Phase.CANCELLING)
    | dict.fromkeys(WAITING | HELD | {Phase.CANCELLED}, Phase.CANCELLED),
    "pause": dict.fromkeys(WORKING | {Phase.PAUSING}, Phase.PAUSING)
    | dict.fromkeys(WAITING | {Phase.PAUSED}, Phase.PAUSED),
    "resume": {phase: phase for phase in WAITING | WORKING}
    | {Phase.PAUSED: Phase.QUEUED, Phase.PAUSING: Phase.RUNNING},
    "start": {phase: phase for phase in WAITING | WORKING} | {Phase.CREATED: Phase.QUEUED},
}
"""Where a wish of the owner takes a job of each phase; it is refused in every other one."""


def clock_off_by(skew_seconds: float):
    """A worker whose own clock is wrong: the store asks the database's."""
    right = time.time

    def wrong() -> float:
        return right() + skew_seconds

    return mock.patch("time.time", wrong)


def test_no_history_breaks_the_store(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    # Random ids could decide between jobs of one moment, and then a history could not be repeated.
    numbers = count()
    monkeypatch.setattr(submission, "new_job_id", lambda _: f"ftjob-{next(numbers):024d}")

    monkeypatch.setattr(order, "caps_of", lambda _, project: CAPS[project])

    class Machine(StoreMachine):
        pass

    Machine.database = database
    run_state_machine_as_test(
        Machine,
        settings=hypothesis.settings(
            max_examples=int(HISTORIES or 10),
            stateful_step_count=30,
            deadline=None,
            derandomize=HISTORIES is None,
            # No shrinking: it would take minutes of real transactions, and forty steps can be read.
            phases=[hypothesis.Phase.generate],
            suppress_health_check=[hypothesis.HealthCheck.too_slow],
        ),
    )
