"""One attempt at one claimed job: run directory, trainer process, heartbeats, and the row at the end.

Knows nothing about Celery or about what a trainer computes. The trainer talks through its run directory, the job row
answers through ``store``; every write carries the claim's fence, so a supervisor that was away too long moves nothing.
No transaction is open while anything is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import structlog
from pydantic import ValidationError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from service.jobs import store
from service.jobs.database import Database
from service.jobs.phases import Kind, Stop
from service.settings import Settings
from service.storage import StorageError
from vlm_dft.config import RunConfig, SupervisionConfig
from vlm_dft.errors import ConfigError, VlmDftError
from vlm_dft.run_dir import Checkpoint, RunDir
from worker.follow import Follower
from worker.meanwhile import meanwhile
from worker.mirror import open_mirror
from worker.record import End, Outcome, record_crash, record_end, record_failure, record_news
from worker.trainer_process import TrainerProcess, isolated, needs_network, trainer_command, trainer_environment

log = structlog.get_logger(__name__)

# A rank ends itself after 0.6 of a lease without renewal. A renewal that took so long that the rank could live past
# the lease's end must not reach it: 0.4 is what is left, and half of that is for the rank to notice.
RANK_SHARE = 0.6
LATE_SHARE = 0.2
STARVED_SHARE = 0.8
MAX_PAUSE_SECONDS = 10.0


@dataclass
class StopFlag:
    """Raised by a signal: end what runs, and take nothing new."""

    is_set: bool = False


@dataclass(frozen=True)
class _Stopping:
    """The trainer was asked to stop; after the deadline (monotonic) it is killed."""

    why: Stop | Literal["drain"]
    deadline: float


def checkpoints_before(claim: store.Claim) -> list[Checkpoint]:
    """Complete checkpoints of earlier attempts, on disk."""
    return [checkpoint for path in claim.previous_run_paths for checkpoint in RunDir(path).complete_checkpoints()]


def newest_checkpoint(claim: store.Claim) -> Checkpoint | None:
    """The complete checkpoint to resume from: the furthest one on disk, of whichever attempt; None: start anew.

    The rows are not asked: the worker that should have recorded the last checkpoint may have died before it could.
    """
    return max(checkpoints_before(claim), key=lambda checkpoint: checkpoint.step, default=None)


def earlier_metrics(claim: store.Claim, to_step: int) -> list[dict[str, Any]]:
    """Metrics lines of earlier attempts up to the step that is resumed from, by step.

    Their supervisor may have been gone while the trainer still worked; what was told before is not told again.
    """
    runs = [RunDir(path) for path in reversed(claim.previous_run_paths)]
    return sorted((line for run in runs for line in run.read_metrics(to_step=to_step)), key=lambda line: line["step"])


class Attempt:
    """Supervises one attempt; see ``run``."""

    def __init__(
        self, database: Database, settings: Settings, claim: store.Claim, *, num_gpus: int, stop: StopFlag
    ) -> None:
        self._database = database
        self._settings = settings
        self._claim = claim
        self._ranks = num_gpus or settings.cpu_ranks if claim.kind == Kind.FINE_TUNING else 1
        self._stop = stop
        self._run = RunDir(claim.run_path)
        self._mirror = open_mirror(settings, claim)
        self._follower = Follower(self._run, self._mirror.is_stored if self._mirror else lambda _: True)
        self._renewed_at = time.monotonic()
        self._renewals = 0
        self._next_beat = 0.0
        self._stopping: _Stopping | None = None
        self._is_lost = False
        self._resume_step: int | None = None
        self._untold: list[dict[str, Any]] = []
        self._is_resume_noted = False

    def run(self) -> Outcome:
        """Start the trainer, see it through, record how it ended. Returns when its process group is gone."""
        max_crashes = self._settings.max_crashes
        try:
            if self._mirror is not None:
                meanwhile(self._mirror.fetch_inputs, self._renew, self._settings.poll_seconds)
            process = self._start()
        except VlmDftError as error:
            failure = error
            return self._settle(lambda s: record_failure(s, self._claim, failure, max_crashes=max_crashes))
        except OSError as error:
            reason = f"the trainer could not be started: {error}"
            return self._settle(lambda s: record_crash(s, self._claim, reason, max_crashes=max_crashes))
        try:
            self._supervise(process)
        finally:
            exit_code = process.finish()
            if self._mirror is not None:
                self._mirror.ask_to_stop()
        if self._mirror is not None and not self._is_lost:
            try:
                meanwhile(self._mirror.finish, self._renew, self._settings.poll_seconds)
            except StorageError as error:
                failure = error
                return self._settle(lambda s: record_failure(s, self._claim, failure, max_crashes=max_crashes))
        if self._is_lost:
            log.warning("the lease is lost: the trainer was killed and nothing is written")
            return Outcome.LOST
        outcome = self._settle(lambda s: self._record_end(s, exit_code))
        if self._mirror is not None and outcome is not Outcome.LOST:
            self._mirror.forget_local()
        return outcome

    def _renew(self) -> None:
        """Keep the lease, when it is time to, while no trainer runs."""
        began = time.monotonic()
        if began < self._next_beat:
            return
        try:
            with self._database.write() as session:
                renewal = store.renew(session, self._claim, self._settings.lease_seconds, None)
        except (OperationalError, InterfaceError) as error:
            log.warning("the database did not take the heartbeat: trying again", error=str(error.orig))
            return
        self._is_lost = self._is_lost or renewal is None
        self._renewed_at, self._next_beat = began, began + self._settings.heartbeat_seconds

    def _start(self) -> TrainerProcess:
        """Raises VlmDftError or OSError."""
        config = self._config()
        self._run.create(config)
        self._renew_ranks()
        environment = trainer_environment(
            self._settings,
            ranks=self._ranks,
            uses_gpu=self._claim.kind != Kind.FILE_VALIDATION,
            uses_judge=config.evaluation is not None and config.evaluation.judge is not None,
        )
        command = trainer_command(self._settings, self._run.path, ranks=self._ranks)
        if self._settings.isolate_trainers and not needs_network(config):
            command = isolated(command)
        process = TrainerProcess(command, environment, self._run.path, self._run.log_path)
        if self._mirror is not None:
            self._mirror.start()
        log.info("trainer started", pid=process.pid, run=str(self._run.path))
        return process

    def _config(self) -> RunConfig:
        """The job's configuration, and what only this attempt knows. Raises ConfigError."""
        try:
            config = RunConfig.model_validate(self._claim.config)
        except ValidationError as error:
            raise ConfigError(f"this version of the worker does not understand the job: {error}") from error
        supervision = SupervisionConfig(
            lease_timeout_seconds=RANK_SHARE * self._settings.lease_seconds,
            attempt=self._claim.attempt,
            request_id=self._claim.origin.get("request_id"),
        )
        config = config.model_copy(update={"supervision": supervision})
        if config.evaluation is not None and self._claim.previous_run_paths:
            # Answers of earlier attempts are kept: the evaluation follows the chain from the newest one on.
            resumed = config.evaluation.model_copy(update={"resume_from": self._claim.previous_run_paths[0]})
            config = config.model_copy(update={"evaluation": resumed})
        checkpoint = newest_checkpoint(self._claim)
        if config.train is None or checkpoint is None:
            return config
        log.info("resuming", step=checkpoint.step, checkpoint=str(checkpoint.path))
        self._resume_step = checkpoint.step
        self._untold = earlier_metrics(self._claim, checkpoint.step)
        train = config.train.model_copy(update={"resume_from": checkpoint.path})
        return config.model_copy(update={"train": train})

    def _supervise(self, process: TrainerProcess) -> None:
        """Return when the trainer has ended, or must be killed."""
        while not process.wait(self._settings.poll_seconds):
            if self._stop.is_set and self._stopping is None:
                self._ask_to_stop(process, "drain", self._settings.drain_seconds)
            self._beat(process)
            if self._is_lost or self._is_starved:
                return
            if self._stopping is not None and time.monotonic() > self._stopping.deadline:
                log.warning("the trainer did not stop in time: killing it", why=self._stopping.why)
                return

    @property
    def _is_starved(self) -> bool:
        """Whether renewals have failed for so long that the ranks have ended themselves, or should have."""
        return time.monotonic() - self._renewed_at > STARVED_SHARE * self._settings.lease_seconds

    def _ask_to_stop(self, process: TrainerProcess, why: Stop | Literal["drain"], grace_seconds: float) -> None:
        log.info("asking the trainer to stop", why=why, grace_seconds=grace_seconds)
        process.ask_to_stop()
        deadline = time.monotonic() + grace_seconds
        # Asked again for another reason, it gets no longer than it had.
        self._stopping = _Stopping(why, min(deadline, self._stopping.deadline) if self._stopping else deadline)

    def _obey(self, process: TrainerProcess, stop: Stop | None) -> None:
        """Ask the trainer to stop for what the job's row says, once for each reason."""
        if stop is not None and (self._stopping is None or self._stopping.why != stop):
            cancel = stop is Stop.CANCEL
            self._ask_to_stop(process, stop, self._settings.cancel_seconds if cancel else self._settings.drain_seconds)

    def _is_stop_wanted(self) -> bool:
        """Whether the row has a reason to stop that the trainer does not know: the next heartbeat may be far."""
        try:
            with self._database.read() as session:
                stop = store.wanted_stop(session, self._claim)
        except (OperationalError, InterfaceError):
            return False  # the heartbeat tells of it
        return stop is not None and (self._stopping is None or self._stopping.why != stop)

    def _beat(self, process: TrainerProcess) -> None:
        """Renew the lease and tell what is new, when it is time to or when there is news."""
        began = time.monotonic()
        news = self._follower.look()
        if began < self._next_beat and not news.is_new and not self._is_stop_wanted():
            return
        try:
            with self._database.write() as session:
                renewal = store.renew(session, self._claim, self._settings.lease_seconds, news.progress)
                if renewal is not None:
                    self._note_resume(session)
                    record_news(session, self._claim, news)
        except (OperationalError, InterfaceError) as error:
            log.warning("the database did not take the heartbeat: trying again", error=str(error.orig))
            return
        if renewal is None:
            self._is_lost = True
            return
        self._follower.keep(news)
        if self._mirror is not None:
            self._mirror.settle(news.steps)
        self._is_resume_noted = True
        self._renewed_at = began
        self._next_beat = began + self._settings.heartbeat_seconds
        if time.monotonic() - began < LATE_SHARE * self._settings.lease_seconds:
            self._renew_ranks()
        self._obey(process, renewal.stop)

    def _note_resume(self, session: Session) -> None:
        """Once: the step to resume from as the disk, not the rows, has it, and what was never told of the way there."""
        if self._is_resume_noted:
            return
        if self._mirror is None:  # with one, what is complete is decided by the object store
            store.forget_missing(session, self._claim, [each.path for each in checkpoints_before(self._claim)])
        if self._resume_step != self._claim.resume_step:
            store.note_resume(session, self._claim, self._resume_step)
        store.record_metrics(session, self._claim, self._untold)

    def _renew_ranks(self) -> None:
        self._renewals += 1
        try:
            self._run.write_lease(self._renewals)
        except OSError as error:  # a full disk: the trainer will meet it too, and say so in its result
            log.warning("the lease file cannot be written: the ranks will end themselves", error=str(error))

    def _record_end(self, session: Session, exit_code: int) -> Outcome:
        """The last news and the end, in one transaction."""
        news = self._follower.look()
        renewal = store.renew(session, self._claim, self._settings.lease_seconds, news.progress)
        if renewal is None:
            return Outcome.LOST
        self._note_resume(session)
        record_news(session, self._claim, news)
        release_reason = None
        if self._stopping is not None:  # for a pause that was taken back: our doing too, however it ended
            drain = self._stopping.why == "drain"
            release_reason = "the worker is shutting down" if drain else "the trainer was asked to stop"
        elif self._is_starved:
            release_reason = "the database was out of reach for longer than the lease allows"
        end = End(self._run, exit_code, renewal.stop, release_reason)
        return record_end(session, self._claim, end, max_crashes=self._settings.max_crashes)

    def _settle(self, write: Callable[[Session], Outcome]) -> Outcome:
        """Commit the end of the attempt, however long the database is away: the fence decides whether it counts.

        Raises the database's error only when the worker is to stop as well; the lease then expires and the job resumes.
        """
        pause = 0.1
        deadline: float | None = None
        while True:
            try:
                with self._database.write() as session:
                    return write(session)
            except (OperationalError, InterfaceError) as error:
                if self._stop.is_set:
                    deadline = deadline or time.monotonic() + self._settings.drain_seconds
                    if time.monotonic() > deadline:
                        raise
                log.warning("the database did not take the end of the attempt: trying again", error=str(error.orig))
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)
