"""The whole service as processes that a storm may kill, and that are started again as systemd or compose would.

API, janitor, one worker for the CPU queue and two for the GPU queue, their broker and their database, and a user who
submits through the stock client with an Idempotency-Key and does not give up.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
from chaos_servers import PostgresCluster, RedisServer
from throwaway import free_port, wait_until
from worker_stack import children_of, is_alive

from cli import programs
from cli.children import Program
from service.jobs.database import Database, open_database
from service.jobs.phases import Queue
from service.settings import Settings

CHAOS_TRAINER = Path(__file__).with_name("chaos_trainer.py")
CHAT = (
    '{{"messages": [{{"role": "user", "content": "{0} + 1?"}}, {{"role": "assistant", "content": "It is {0} + 1."}}]}}'
)
LEASE_SECONDS = 4.0


class ChaosService:
    """kind: embedded (SQLite, filesystem broker) or team (PostgreSQL, Redis). persistent: Redis keeps messages."""

    def __init__(
        self,
        directory: Path,
        model: Path,
        kind: str,
        *,
        persistent: bool = False,
        real_trainer: bool = False,
        **extra: Any,
    ) -> None:
        self.directory, self.kind = directory, kind
        models = directory / "models"
        models.mkdir(parents=True)
        shutil.copytree(model, models / "tiny")
        self.redis = RedisServer(directory / "redis", persistent=persistent) if kind == "team" else None
        self.postgres = PostgresCluster() if kind == "team" else None
        for server in (self.redis, self.postgres):
            if server is not None:
                server.start()
        self.settings = Settings(
            **{
                "data_dir": directory / "data",
                "models_dir": models,
                "port": free_port(),
                "lease_seconds": LEASE_SECONDS,
                "heartbeat_seconds": 0.5,
                "janitor_seconds": 0.3,
                "republish_seconds": 1.5,
                "poll_seconds": 0.1,
                "drain_seconds": 5.0,
                "cancel_seconds": 2.0,
                "min_free_bytes": 0,
                "max_crashes": 1000,  # whatever dies was killed: no job may end for it
                "trainer_python": None if real_trainer else _trainer_python(directory),
                "database_url": self.postgres.url if self.postgres else None,
                "broker_url": self.redis.url if self.redis else None,
                **extra,
            }
        )
        self.settings.data.mkdir(parents=True, exist_ok=True)
        self.database: Database = open_database(self.settings)
        self.database.upgrade()
        self._programs = {program.name: program for program in self._all_programs()}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._start_at: dict[str, float] = dict.fromkeys(self._programs, 0.0)
        self._stopped: dict[int, float] = {}
        self.url = f"http://127.0.0.1:{self.settings.port}"

    def _all_programs(self) -> Iterator[Program]:
        yield programs.api(self.settings)
        yield programs.janitor(self.settings)
        yield from programs.workers(self.settings, Queue.CPU, 1)
        yield from programs.workers(self.settings, Queue.GPU, 2)

    def tend(self, generator: random.Random | None = None) -> None:
        """Start what has died, after a moment; wake what was stopped, when its time is over."""
        now = time.monotonic()
        for pid, until in list(self._stopped.items()):
            if now >= until:
                del self._stopped[pid]
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        for name, program in self._programs.items():
            process = self._processes.get(name)
            if process is not None and process.poll() is not None:
                del self._processes[name]
                self._start_at[name] = now + (generator.uniform(0.0, 1.5) if generator else 0.0)
            elif process is None and now >= self._start_at[name]:
                self._start(program)

    def _start(self, program: Program) -> None:
        program.log_path.parent.mkdir(parents=True, exist_ok=True)
        environment = program.environment | {"OMP_NUM_THREADS": "1"}
        with program.log_path.open("ab") as log:
            self._processes[program.name] = subprocess.Popen(
                program.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def pid(self, name: str) -> int | None:
        """Of a program that runs."""
        process = self._processes.get(name)
        return process.pid if process is not None and process.poll() is None else None

    def supervisors(self) -> list[int]:
        """Pool children of the GPU workers: each supervises at most one trainer."""
        mains = [pid for name in self._programs if name.startswith("gpu") and (pid := self.pid(name))]
        return [child for main in mains for child in _children(main)]

    def trainers(self) -> list[int]:
        """Processes that supervisors have started; torchrun for a training with ranks."""
        return [child for supervisor in self.supervisors() for child in _children(supervisor) if is_alive(child)]

    def stop_for(self, pid: int, seconds: float) -> None:
        """SIGSTOP now, SIGCONT by ``tend``."""
        os.kill(pid, signal.SIGSTOP)
        self._stopped[pid] = time.monotonic() + seconds

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=10.0)

    def wait_until_ready(self, seconds: float = 90) -> None:
        def ready() -> bool:
            self.tend()
            with suppress(httpx.HTTPError):
                return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
            return False

        wait_until(ready, seconds, f"the service is ready: {self.logs()}")

    def upload(self, rows: int = 16) -> str:
        """Id of a validated training file."""
        lines = "\n".join(CHAT.format(number) for number in range(rows)) + "\n"
        with self.client() as client:
            file_id = client.files.create(file=("train.jsonl", lines.encode()), purpose="fine-tune").id
            wait_until(lambda: client.files.retrieve(file_id).status == "processed", 60, f"validated: {self.logs()}")
        return file_id

    def logs(self) -> str:
        found = sorted((self.settings.data / "logs").glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in found)

    def close(self) -> None:
        for pid in self._stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        for process in self._processes.values():
            process.kill()  # trainers end with their supervisors
        for process in self._processes.values():
            process.wait()
        self.database.close()
        if self.redis is not None:
            self.redis.kill()
        if self.postgres is not None:
            self.postgres.remove()


@contextmanager
def chaos_service(directory: Path, model: Path, kind: str, **extra: Any) -> Iterator[ChaosService]:
    service = ChaosService(directory, model, kind, **extra)
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.close()


def _children(pid: int) -> list[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        return children_of(pid)
    return []


def _trainer_python(directory: Path) -> Path:
    python = directory / "chaos-python"
    python.write_text(f'#!/bin/sh\nfor last; do :; done\nexec {sys.executable} {CHAOS_TRAINER} "$last"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python
