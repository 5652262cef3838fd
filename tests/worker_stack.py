"""Real worker processes on a real broker and database, with short leases and the step trainer."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import make_url, select
from throwaway import wait_until

from service.jobs import queue, store
from service.jobs.database import Database, open_database
from service.jobs.phases import TERMINAL, Kind
from service.jobs.tables import Job, JobEvent
from service.settings import Settings
from vlm_dft.config import RunConfig

STEP_TRAINER = Path(__file__).with_name("step_trainer.py")


def step_settings(directory: Path, **values: Any) -> Settings:
    """Short leases, and a trainer_python that runs the step trainer whatever module it is asked for."""
    python = directory / "step-python"
    python.write_text(f'#!/bin/sh\nfor last; do :; done\nexec {sys.executable} {STEP_TRAINER} "$last"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    short = {
        "data_dir": directory / "data",
        "trainer_python": python,
        "lease_seconds": 3.0,
        "heartbeat_seconds": 0.5,
        "janitor_seconds": 0.3,
        "republish_seconds": 1.0,
        "poll_seconds": 0.1,
        "drain_seconds": 5.0,
        "cancel_seconds": 2.0,
    }
    return Settings(**(short | values))


def settings_environment(settings: Settings) -> dict[str, str]:
    chosen = {f"VLM_DFT_{name.upper()}": getattr(settings, name) for name in settings.model_fields_set}
    return os.environ | {name: str(value) for name, value in chosen.items() if value is not None}


class Stack:
    """The processes of one service without its API, and what a user would see of its jobs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        settings.data.mkdir(parents=True, exist_ok=True)
        self.database: Database = open_database(settings)
        self.database.upgrade()
        queue.prepare_broker(settings)
        self.celery = queue.create_celery(settings)
        self.processes: list[subprocess.Popen[bytes]] = []

    def start_worker(self, queue_name: str = "gpu") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-P", "prefork", "-c", "1"]
        command += ["-Q", queue_name, "-n", f"w{len(self.processes)}@%h", "--without-mingle", "--without-gossip"]
        return self._start(command, f"worker-{len(self.processes)}")

    def start_janitor(self) -> subprocess.Popen[bytes]:
        return self._start([sys.executable, "-m", "worker.janitor"], f"janitor-{len(self.processes)}")

    def _start(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        environment = settings_environment(self.settings) | {"REMAP_SIGTERM": "SIGQUIT", "OMP_NUM_THREADS": "1"}
        with (self.settings.data / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.processes.append(process)
        return process

    def submit(self, *, steps: int = 5, step_seconds: float = 0.1, checkpoint_every: int = 2, **plan: Any) -> str:
        """Submit a training of the step trainer; returns the job's id."""
        path = self.settings.data / f"plan-{len(list(self.settings.data.glob('plan-*')))}.json"
        path.write_text(json.dumps({"step_seconds": step_seconds, **plan}))
        train = {"model": "/none", "dataset": path, "max_steps": steps, "checkpoint_every_steps": checkpoint_every}
        new = store.NewJob(
            project="default",
            kind=Kind.FINE_TUNING,
            request={},
            config=RunConfig.model_validate({"run_id": "?", "train": train}),
            runs_dir=self.settings.runs_dir,
            model="tiny",
            root="tiny",
        )
        with self.database.write() as session:
            job_id = store.submit(session, new).id
        queue.flush_outbox(self.database, self.celery)
        return job_id

    def job(self, job_id: str) -> Job:
        with self.database.read() as session:
            return session.get_one(Job, job_id)

    def events(self, job_id: str) -> list[JobEvent]:
        with self.database.read() as session:
            return list(session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)))

    def journal(self, job_id: str) -> list[dict[str, Any]]:
        path = self.settings.runs_dir / job_id / "journal.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_step(self, job_id: str, step: int, seconds: float = 30) -> dict[str, Any]:
        """The journal's line of that step or a later one."""
        found = wait_until(
            lambda: [line for line in self.journal(job_id) if line["what"] == "step" and line["step"] >= step],
            seconds,
            f"{job_id} reaches step {step}: {self.logs()}",
        )
        return found[0]

    def wait_for_end(self, job_id: str, seconds: float = 40) -> Job:
        return wait_until(
            lambda: job if (job := self.job(job_id)).phase in TERMINAL else None,
            seconds,
            f"{job_id} ends: {self.logs()}",
        )

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.settings.data.glob("*.log")))

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGCONT)
                process.kill()
            process.wait()
        self.database.close()


@contextmanager
def running_stack(settings: Settings) -> Iterator[Stack]:
    stack = Stack(settings)
    try:
        yield stack
    finally:
        stack.stop()


def new_database(server_url: str) -> str:
    """The URL of an empty database on a PostgreSQL server."""
    server = make_url(server_url)
    name = f"stack_{os.getpid()}_{time.monotonic_ns()}"
    plain = server.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return server.set(database=name).render_as_string(hide_password=False)


def overlaps(journal: list[dict[str, Any]]) -> int:
    """Lines that a process wrote after another one had begun: each is a step of two executions at once."""
    newest, count, seen = None, 0, set()
    for line in sorted(journal, key=lambda line: line["time"]):
        if line["pid"] not in seen:
            seen.add(line["pid"])
            newest = line["pid"]
        elif line["pid"] != newest:
            count += 1
    return count


def children_of(pid: int) -> list[int]:
    """Child processes of a process, oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
